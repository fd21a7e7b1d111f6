// The same attention for fp32, plainly: for checks, and for who wants fp32. Four lanes own a row and hold 16 of its 64 values each,
// 8 c .. 8 c + 7 and 32 + 8 c .. (c = lane % 4), so RoPE's pairs stay within a lane; the other side streams through shared memory by
// kKeys rows, turned on the way, and every lane of a warp reads the same row of it at the same time.
#include <cfloat>

#include "attention.cuh"

namespace sae {
namespace cuda {
namespace {

constexpr int kThreads = 128, kRowsOfBlock = kThreads / 4, kKeys = 32;

struct Part { float v[16]; };                                            // one lane's share of a row

__device__ inline int column(int c, int i) { return i % 8 + 8 * c + i / 8 * 32; }
__device__ inline Part load_part(const float* row, int c) {
  Part x;
#pragma unroll
  for (int i = 0; i < 16; ++i) x.v[i] = row[column(c, i)];
  return x;
}
__device__ inline void store_part(float* row, int c, const Part& x, float scale) {
#pragma unroll
  for (int i = 0; i < 16; ++i) row[column(c, i)] = x.v[i] * scale;
}
__device__ inline void turn_part(Part& x, int c, int token, const Attention& a, bool back) {
  if (token < a.prefix) return;
  const float2* angle = angles(a, token, 8 * c);
#pragma unroll
  for (int i = 0; i < 8; ++i) back ? turn_back(x.v[i], x.v[i + 8], angle[i]) : turn(x.v[i], x.v[i + 8], angle[i]);
}
__device__ inline float dot(const Part& x, const Part& y) {
  float s = 0.f;
#pragma unroll
  for (int i = 0; i < 16; ++i) s += x.v[i] * y.v[i];
  return quad_sum(s);
}
__device__ inline void add(Part& x, float s, const Part& y) {
#pragma unroll
  for (int i = 0; i < 16; ++i) x.v[i] += s * y.v[i];
}
// Rows first .. first + kKeys of src -> tile [kKeys, 64], turned by RoPE if asked.
__device__ inline void load_tile(float* tile, Rows<const float> src, int first, const Attention& a, bool turned) {
  const int r = threadIdx.x / 4, c = threadIdx.x % 4, t = first + r;
  if (t >= a.N) return;
  Part x = load_part(src[t], c);
  if (turned) turn_part(x, c, t, a, false);
  store_part(tile + r * D, c, x, 1.f);
}
__device__ inline int smaller(int x, int y) { return x < y ? x : y; }

__global__ void __launch_bounds__(kThreads) forward_kernel(const Attention a) {
  float *ks = shared_memory<float>(), *vs = ks + kKeys * D;
  const Place p = place(a, kRowsOfBlock);
  const float* qkv = static_cast<const float*>(a.qkv);
  const int c = threadIdx.x % 4, row = p.tile * kRowsOfBlock + threadIdx.x / 4, safe = smaller(row, a.N - 1);  // past the end: the last again
  Part q = load_part(qkv_rows(qkv, a, p, 0)[safe], c), o{};
  turn_part(q, c, safe, a, false);
  float m = -FLT_MAX, l = 0.f;                                           // a first score of -INFINITY less -INFINITY would be a NaN
  for (int base = 0; base < a.N; base += kKeys) {
    if (base) __syncthreads();
    load_tile(ks, qkv_rows(qkv, a, p, 1), base, a, true);
    load_tile(vs, qkv_rows(qkv, a, p, 2), base, a, false);
    __syncthreads();
    for (int j = 0; j < smaller(kKeys, a.N - base); ++j) {
      const float s = dot(q, load_part(ks + j * D, c)) * kScoreScale;
      if (s > m) {
        const float shrink = exp2f(m - s);
        m = s;
        l *= shrink;
#pragma unroll
        for (int i = 0; i < 16; ++i) o.v[i] *= shrink;
      }
      const float weight = exp2f(s - m);
      l += weight;
      add(o, weight, load_part(vs + j * D, c));
    }
  }
  if (row >= a.N) return;
  store_part(out_rows(static_cast<float*>(a.o), a, p)[row], c, o, 1.f / l);
  if (c == 0) a.lse[stat_row(a, p) + row] = m + log2f(l);
}

__global__ void __launch_bounds__(kThreads) backward_q_kernel(const Attention a) {
  float *ks = shared_memory<float>(), *vs = ks + kKeys * D;
  const Place p = place(a, kRowsOfBlock);
  const float* qkv = static_cast<const float*>(a.qkv);
  const int c = threadIdx.x % 4, row = p.tile * kRowsOfBlock + threadIdx.x / 4, safe = smaller(row, a.N - 1);
  Part q = load_part(qkv_rows(qkv, a, p, 0)[safe], c), dq{};
  const Part g = load_part(out_rows(static_cast<const float*>(a.dout), a, p)[safe], c);
  turn_part(q, c, safe, a, false);
  const float delta = dot(g, load_part(out_rows(static_cast<const float*>(a.out), a, p)[safe], c)), lse = a.lse[stat_row(a, p) + safe];
  for (int base = 0; base < a.N; base += kKeys) {
    if (base) __syncthreads();
    load_tile(ks, qkv_rows(qkv, a, p, 1), base, a, true);
    load_tile(vs, qkv_rows(qkv, a, p, 2), base, a, false);
    __syncthreads();
    for (int j = 0; j < smaller(kKeys, a.N - base); ++j) {
      const Part k = load_part(ks + j * D, c);
      const float weight = exp2f(dot(q, k) * kScoreScale - lse);
      add(dq, weight * (dot(g, load_part(vs + j * D, c)) - delta), k);
    }
  }
  if (row >= a.N) return;
  turn_part(dq, c, row, a, true);
  store_part(qkv_rows(static_cast<float*>(a.dqkv), a, p, 0)[row], c, dq, kScale);
  if (c == 0) a.delta[stat_row(a, p) + row] = delta;
}

__global__ void __launch_bounds__(kThreads) backward_kv_kernel(const Attention a) {
  float *qs = shared_memory<float>(), *gs = qs + kKeys * D, *lse = gs + kKeys * D, *delta = lse + kKeys;
  const Place p = place(a, kRowsOfBlock);
  const float* qkv = static_cast<const float*>(a.qkv);
  const int c = threadIdx.x % 4, row = p.tile * kRowsOfBlock + threadIdx.x / 4, safe = smaller(row, a.N - 1);
  Part k = load_part(qkv_rows(qkv, a, p, 1)[safe], c), dk{}, dv{};
  const Part v = load_part(qkv_rows(qkv, a, p, 2)[safe], c);
  turn_part(k, c, safe, a, false);
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
      const Part q = load_part(qs + j * D, c), g = load_part(gs + j * D, c);
      const float weight = exp2f(dot(k, q) * kScoreScale - lse[j]);
      add(dv, weight, g);
      add(dk, weight * (dot(v, g) - delta[j]), q);
    }
  }
  if (row >= a.N) return;
  turn_part(dk, c, row, a, true);
  store_part(qkv_rows(static_cast<float*>(a.dqkv), a, p, 1)[row], c, dk, kScale);
  store_part(qkv_rows(static_cast<float*>(a.dqkv), a, p, 2)[row], c, dv, 1.f);
}

constexpr size_t kShared = 2 * kKeys * D * sizeof(float);
}  // namespace

const char* attention_forward_fp32(const Attention& a, void* stream) {
  return launch(forward_kernel, blocks(a, kRowsOfBlock), kThreads, kShared, stream, a);
}
const char* attention_backward_fp32(const Attention& a, void* stream) {
  if (const char* error = launch(backward_q_kernel, blocks(a, kRowsOfBlock), kThreads, kShared, stream, a)) return error;
  return launch(backward_kv_kernel, blocks(a, kRowsOfBlock), kThreads, kShared + 2 * kKeys * sizeof(float), stream, a);
}

}  // namespace cuda
}  // namespace sae
