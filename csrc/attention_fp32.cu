// START HERE. Attention in fp32 on a GPU, plainly: flash attention to read, to check others, and for fp32.
//
// Where to read on, each with what the last one taught:
//   attention_fp32.cu   this file: tiles in shared memory, online softmax, RoPE, backward in two kernels
//   attention.cuh       where a head's rows lie in [B,N,3,H,64], how RoPE turns a pair
//   attention_mma.cu    the same in bf16 and fp16 on tensor cores: who holds what, and why it is fast
//   gaussian.cu         one pass over memory: the Gaussian, with noise from a counter, and the squared error;
//                       noise.h is that counter
//   norm.cu             GroupNorm with SiLU: sums over a tensor in three kernels
//   vector.cuh          eight values a thread; ptx.cuh: the instructions that CUDA C++ has no word for
//   ops.cpp             what PyTorch calls; kernels.h: the arguments of all kernels
//   cpu_ops.cpp         the same ops on the CPU: tasks and threads
//   cpu_kernels.h       what a CPU kernel takes; they are cpu_attention.h, cpu_gaussian.h and cpu_norm.h
//   cpu_isa.h           how these are compiled for each instruction set; cpu_simd.h: the vectors they work on
//
// The math, for one (image, head), with query i and key j, each a row of 64 values:
//   forward    s_ij = q_i.k_j log2(e) / 8,  p_ij = 2^(s_ij - lse_i),  lse_i = log2 sum_j 2^s_ij
//              o_i = sum_j p_ij v_j                                                writes O, lse
//   backward   delta_i = do_i.o_i,  ds_ij = p_ij (do_i.v_j - delta_i)
//              dv_j = sum_i p_ij do_i,  dq_i = sum_j ds_ij k_j / 8,
//              dk_j = sum_i ds_ij q_i / 8                                          writes dQ, dK, dV
// q and k are turned by RoPE first, dq and dk turned back last. Scores are in base 2, for exp2 is an
// instruction of the GPU. Backward has p again from lse, without a pass for the maximum. In the code dO is
// a.dout, and g is a row of it.
//
// Grid: a block of 128 threads for every 32 rows of every (image, head). Four lanes own a row: the one with
// c = lane % 4 holds the values 8 c .. 8 c + 7 and 32 + 8 c .. 32 + 8 c + 7, so that RoPE's pairs (i, i + 32)
// share a lane. A dot product is 16 multiplications a lane and two shuffles.
// Shared memory: two tiles of 32 rows, 16 KB. Registers (sm_90): forward 72, dQ 95, dK and dV 119.
// Memory moved: a block reads its own rows once, and all of its head's K and V, from the L2 cache after the
// first block; nothing of size N x N is written. Backward needs qkv, O, lse.
#include <cfloat>

#include "attention.cuh"

namespace sae {
namespace cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kRowsOfBlock = kThreads / 4;
constexpr int kKeys = kThreads / 4;                           // rows of a tile: load_tile has 4 lanes a row

// ------------------------------------------------------------------ a lane's share of a row

struct Share { float v[16]; };

__device__ inline int column(int c, int i) { return i % 8 + 8 * c + i / 8 * 32; }

__device__ inline Share load_share(const float* row, int c) {
  Share x;
#pragma unroll
  for (int i = 0; i < 16; ++i) x.v[i] = row[column(c, i)];
  return x;
}
__device__ inline void store_share(float* row, int c, const Share& x, float scale) {
#pragma unroll
  for (int i = 0; i < 16; ++i) row[column(c, i)] = x.v[i] * scale;
}
__device__ inline void turn_share(Share& x, int c, int token, const Attention& a, bool back) {
  if (token < a.prefix) return;
  const float2* angle = angles(a, token, 8 * c);
#pragma unroll
  for (int i = 0; i < 8; ++i)
    back ? turn_back(x.v[i], x.v[i + 8], angle[i]) : turn(x.v[i], x.v[i + 8], angle[i]);
}
// The dot product of two rows, in all four lanes.
__device__ inline float dot(const Share& x, const Share& y) {
  float s = 0.f;
#pragma unroll
  for (int i = 0; i < 16; ++i) s += x.v[i] * y.v[i];
  return quad_sum(s);
}
__device__ inline void add(Share& x, float s, const Share& y) {
#pragma unroll
  for (int i = 0; i < 16; ++i) x.v[i] += s * y.v[i];
}

// Rows first .. first + kKeys - 1 of src -> tile [kKeys, 64], turned by RoPE if asked.
__device__ inline void load_tile(float* tile, Rows<const float> src, int first, const Attention& a,
                                 bool turned) {
  const int r = threadIdx.x / 4, c = threadIdx.x % 4, t = first + r;
  if (t >= a.N) return;
  Share x = load_share(src[t], c);
  if (turned) turn_share(x, c, t, a, false);
  store_share(tile + r * D, c, x, 1.f);
}

// Which row a thread works on. Past the end it computes the last row again and stores nothing: the barriers
// need every thread.
struct Lane {
  int c, row, safe;
};
__device__ inline int smaller(int x, int y) { return x < y ? x : y; }
__device__ inline Lane lane_of(const Attention& a, const Place& p) {
  const int row = p.tile * kRowsOfBlock + threadIdx.x / 4;
  return {int(threadIdx.x % 4), row, smaller(row, a.N - 1)};
}

// ------------------------------------------------------------------ kernels

// The four lanes of a row own query q, turned by RoPE:
//   m = -max float, l = 0, o = 0
//   for each tile of 32 keys, K turned, in shared memory:
//     for each key k, v of the tile:
//       s = q.k log2(e) / 8
//       if s > m: shrink l and o by 2^(m - s); m = s        the maximum so far: no power of 2 overflows
//       l += 2^(s - m);  o += 2^(s - m) v
//   O = o / l;  lse = m + log2 l
__global__ void __launch_bounds__(kThreads) forward_kernel(const Attention a) {
  float *ks = shared_memory<float>(), *vs = ks + kKeys * D;
  const Place p = place(a, kRowsOfBlock);
  const auto [c, row, safe] = lane_of(a, p);
  const float* qkv = static_cast<const float*>(a.qkv);

  Share q = load_share(qkv_rows(qkv, a, p, 0)[safe], c), o{};
  turn_share(q, c, safe, a, false);
  float m = -FLT_MAX, l = 0.f;  // not -INFINITY: s - m would be a NaN where s is -INFINITY
  for (int base = 0; base < a.N; base += kKeys) {
    if (base) __syncthreads();                                // the last tile is still being read
    load_tile(ks, qkv_rows(qkv, a, p, 1), base, a, true);
    load_tile(vs, qkv_rows(qkv, a, p, 2), base, a, false);
    __syncthreads();

    for (int j = 0; j < smaller(kKeys, a.N - base); ++j) {
      const float s = dot(q, load_share(ks + j * D, c)) * kScoreScale;
      if (s > m) {
        const float shrink = exp2f(m - s);
        m = s;
        l *= shrink;
#pragma unroll
        for (int i = 0; i < 16; ++i) o.v[i] *= shrink;
      }
      const float weight = exp2f(s - m);
      l += weight;
      add(o, weight, load_share(vs + j * D, c));
    }
  }

  if (row >= a.N) return;
  store_share(out_rows(static_cast<float*>(a.out), a, p)[row], c, o, 1.f / l);
  if (c == 0) a.lse[stat_row(a, p) + row] = m + log2f(l);
}

// The four lanes of a row own query q, turned by RoPE, with g = dO, and stream keys as forward does:
//   delta = g.o                                              written for the other kernel
//   for each key k, v:  p = 2^(s - lse);  dq += p (g.v - delta) k
//   dQ = dq / 8, turned back
__global__ void __launch_bounds__(kThreads) backward_q_kernel(const Attention a) {
  float *ks = shared_memory<float>(), *vs = ks + kKeys * D;
  const Place p = place(a, kRowsOfBlock);
  const auto [c, row, safe] = lane_of(a, p);
  const float* qkv = static_cast<const float*>(a.qkv);

  Share q = load_share(qkv_rows(qkv, a, p, 0)[safe], c), dq{};
  const Share g = load_share(out_rows(static_cast<const float*>(a.dout), a, p)[safe], c);
  turn_share(q, c, safe, a, false);
  const float delta = dot(g, load_share(out_rows(static_cast<const float*>(a.out), a, p)[safe], c));
  const float lse = a.lse[stat_row(a, p) + safe];
  for (int base = 0; base < a.N; base += kKeys) {
    if (base) __syncthreads();
    load_tile(ks, qkv_rows(qkv, a, p, 1), base, a, true);
    load_tile(vs, qkv_rows(qkv, a, p, 2), base, a, false);
    __syncthreads();

    for (int j = 0; j < smaller(kKeys, a.N - base); ++j) {
      const Share k = load_share(ks + j * D, c);
      const float weight = exp2f(dot(q, k) * kScoreScale - lse);
      add(dq, weight * (dot(g, load_share(vs + j * D, c)) - delta), k);
    }
  }

  if (row >= a.N) return;
  turn_share(dq, c, row, a, true);
  store_share(qkv_rows(static_cast<float*>(a.dqkv), a, p, 0)[row], c, dq, kScale);
  if (c == 0) a.delta[stat_row(a, p) + row] = delta;
}

// The four lanes of a row own key k, turned by RoPE, and its v, and stream queries q with g = dO, lse and
// delta. So each gradient has one writer: no atomics, always the same bits.
//   for each query:  p = 2^(s - lse);  dv += p g;  dk += p (g.v - delta) q
//   dK = dk / 8, turned back;  dV = dv
__global__ void __launch_bounds__(kThreads) backward_kv_kernel(const Attention a) {
  float *qs = shared_memory<float>(), *gs = qs + kKeys * D, *lse = gs + kKeys * D, *delta = lse + kKeys;
  const Place p = place(a, kRowsOfBlock);
  const auto [c, row, safe] = lane_of(a, p);
  const float* qkv = static_cast<const float*>(a.qkv);

  Share k = load_share(qkv_rows(qkv, a, p, 1)[safe], c), dk{}, dv{};
  const Share v = load_share(qkv_rows(qkv, a, p, 2)[safe], c);
  turn_share(k, c, safe, a, false);
  for (int base = 0; base < a.N; base += kKeys) {
    if (base) __syncthreads();
    load_tile(qs, qkv_rows(qkv, a, p, 0), base, a, true);
    load_tile(gs, out_rows(static_cast<const float*>(a.dout), a, p), base, a, false);
    if (threadIdx.x < kKeys && base + static_cast<int>(threadIdx.x) < a.N) {
      lse[threadIdx.x] = a.lse[stat_row(a, p) + base + threadIdx.x];
      delta[threadIdx.x] = a.delta[stat_row(a, p) + base + threadIdx.x];
    }
    __syncthreads();

    for (int j = 0; j < smaller(kKeys, a.N - base); ++j) {
      const Share q = load_share(qs + j * D, c), g = load_share(gs + j * D, c);
      const float weight = exp2f(dot(k, q) * kScoreScale - lse[j]);
      add(dv, weight, g);
      add(dk, weight * (dot(v, g) - delta[j]), q);
    }
  }

  if (row >= a.N) return;
  turn_share(dk, c, row, a, true);
  store_share(qkv_rows(static_cast<float*>(a.dqkv), a, p, 1)[row], c, dk, kScale);
  store_share(qkv_rows(static_cast<float*>(a.dqkv), a, p, 2)[row], c, dv, 1.f);
}

constexpr size_t kTwoTiles = 2 * kKeys * D * sizeof(float);
constexpr size_t kTwoRows = 2 * kKeys * sizeof(float);        // lse and delta

}  // namespace

const char* attention_forward_fp32(const Attention& a, void* stream) {
  return launch(forward_kernel, blocks(a, kRowsOfBlock), kThreads, kTwoTiles, stream, a);
}
const char* attention_backward_fp32(const Attention& a, void* stream) {
  const int64_t n = blocks(a, kRowsOfBlock);
  if (const char* error = launch(backward_q_kernel, n, kThreads, kTwoTiles, stream, a)) return error;
  return launch(backward_kv_kernel, n, kThreads, kTwoTiles + kTwoRows, stream, a);
}

}  // namespace cuda
}  // namespace sae
