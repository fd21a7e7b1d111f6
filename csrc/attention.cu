// O = softmax(rope(Q) rope(K)^T / 8) V for bf16 and fp16, from the packed projection [B,N,3,H,64], and its backward.
//
// A warp owns 16 kTiles rows in registers and streams the other side, which lies in shared memory in chunks of up to kChunk rows:
// forward and dQ own queries and stream keys, dK/dV owns keys and streams queries. No atomics, so the result is always the same.
//   forward   S = Q K^T, online softmax, O += P V                                        writes O, lse
//   dQ        P = 2^(S - lse), dP = dO V^T, dS = P (dP - delta), dQ += dS K              writes dQ, delta = rowsum(dO O)
//   dK, dV    S^T = K Q^T, dV += P^T dO, dP^T = V dO^T, dK += dS^T Q                     writes dK, dV
//
// Why not a general flash attention: N is 261 = 2 * 128 + 5 at 256 x 256 pixels. Tiles of 128 do 384^2 of work for 261^2; rows in
// steps of 16 do 272^2, and all of a head's K and V (70 KB) fit in shared memory, three blocks to a multiprocessor.
// RoPE costs no pass over memory: Q turns in registers (columns c and c + 32 of an mma operand sit in the same lane), K in shared
// memory, dQ and dK turn back before they are stored. What is streamed comes by cp.async.
// 32 rows a warp where registers allow: each B operand read by ldmatrix then feeds two products, which halves the traffic of shared
// memory, otherwise the bottleneck.
// Bytes at B 16, N 261, H 20: forward reads 32 and writes 11 MB (10 us at 4.3 TB/s); eager RoPE + attention moves three times that.
#include "attention.cuh"

namespace sae {
namespace cuda {
namespace {

using u16 = uint16_t;
constexpr int kTiles = 2;                                                // of 16 rows, owned by a warp
constexpr int kWarps = 3, kThreads = 32 * kWarps;
constexpr int kRowsOfBlock = 16 * kTiles * kWarps;                       // 96: N 261 takes 3 blocks, their last warp is full by 5 of 32
#ifndef SAE_CHUNK
#define SAE_CHUNK 272                                                    // N 261 in one piece; tests take less to see many chunks
#endif
constexpr int kChunk = SAE_CHUNK;
constexpr int kStep = 32, kStepBackward = 16;                            // streamed rows at a time; forward ends a chunk with 16
constexpr size_t kTwoTiles = 2 * kChunk * D * sizeof(u16);

// ------------------------------------------------------------------ shared memory: rows of 128 bytes

// 16-byte cells; XOR with the row makes 8 rows of one column touch all 32 banks. row0 must be a multiple of 8.
__device__ inline u16* cell(u16* tile, int row0, int row, int column) {
  return tile + (row0 + row) * D + ((column ^ (row & 7)) << 3);
}
__device__ inline void load_tile(u16* tile, Rows<const u16> src, int first, int rows, int n) {
  for (int i = threadIdx.x; i < rows * 8; i += kThreads) {
    const int r = i / 8, t = first + r;
    copy_async(cell(tile, 0, r, i % 8), src[t < n ? t : 0] + i % 8 * 8, t < n);
  }
}
// The same, for `turn_tile`: a thread copies both cells of the pairs that it will turn.
__device__ inline void load_tile_of_pairs(u16* tile, Rows<const u16> src, int first, int rows, int n) {
  for (int i = threadIdx.x; i < rows * 4; i += kThreads) {
    const int r = i / 4, t = first + r;
    const u16* from = src[t < n ? t : 0] + i % 4 * 8;
    copy_async(cell(tile, 0, r, i % 4), from, t < n);
    copy_async(cell(tile, 0, r, i % 4 + 4), from + 32, t < n);
  }
}
template <class T>
__device__ inline void turn_pairs(uint32_t& low, uint32_t& high, float2 angle0, float2 angle1) {
  float2 x = unpack<T>(low), y = unpack<T>(high);
  turn(x.x, y.x, angle0);
  turn(x.y, y.y, angle1);
  low = pack<T>(x.x, x.y);
  high = pack<T>(y.x, y.y);
}
// Turned where it lies, once it has landed: so all loads of memory are under way at once, and no register waits for one.
template <class T>
__device__ inline void turn_tile(u16* tile, int first, int rows, const Attention& a) {
  constexpr int kRows = kThreads / 4;                                    // at a time
  const int c = threadIdx.x % 4;
  int r = threadIdx.x / 4, x = first + r - a.prefix;
  int y = x > 0 ? x / a.w : 0;                                           // row and column of the patch
  x -= y * a.w;
  for (; r < rows && first + r < a.N; r += kRows, x += kRows) {
    for (; x >= a.w; x -= a.w) ++y;
    if (x < 0) continue;                                                 // CLS and registers have no position
    const float4* angle = reinterpret_cast<const float4*>(angles(a, y, x, c * 8));
    const float4 p = angle[0], q = angle[1], u = angle[2], v = angle[3];
    uint4* low = reinterpret_cast<uint4*>(cell(tile, 0, r, c));
    uint4* high = reinterpret_cast<uint4*>(cell(tile, 0, r, c + 4));
    uint4 e = *low, f = *high;
    turn_pairs<T>(e.x, f.x, make_float2(p.x, p.y), make_float2(p.z, p.w));
    turn_pairs<T>(e.y, f.y, make_float2(q.x, q.y), make_float2(q.z, q.w));
    turn_pairs<T>(e.z, f.z, make_float2(u.x, u.y), make_float2(u.z, u.w));
    turn_pairs<T>(e.w, f.w, make_float2(v.x, v.y), make_float2(v.z, v.w));
    *low = e;
    *high = f;
  }
}

// ------------------------------------------------------------------ registers: tiles of 16 rows, operand A or fp32 accumulator

struct Operand { uint32_t v[4][4]; };                                    // [16,64]: k step, mma register
struct Sum { float v[8][4]; };                                           // [16,64]: 8 columns, mma register

__device__ inline void load_operand(Operand& f, Rows<const u16> src, int row0, int n) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int k = 0; k < 4; ++k)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int r = row0 + lane / 4 + (i & 1) * 8, c = k * 16 + lane % 4 * 2 + (i >> 1) * 8;
      f.v[k][i] = r < n ? *reinterpret_cast<const uint32_t*>(src[r] + c) : 0;
    }
}
template <class T>
__device__ inline void turn_operand(Operand& f, int row0, const Attention& a) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int r = row0 + lane / 4 + half * 8;
    if (r < a.prefix || r >= a.N) continue;
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const float2* angle = angles(a, r, k * 16) + lane % 4 * 2;
#pragma unroll
      for (int i = 0; i < 2; ++i) turn_pairs<T>(f.v[k][2 * i + half], f.v[k + 2][2 * i + half], angle[8 * i], angle[8 * i + 1]);
    }
  }
}
__device__ inline void turn_back_sum(Sum& s, int row0, const Attention& a) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int r = row0 + lane / 4 + half * 8;
    if (r < a.prefix || r >= a.N) continue;
#pragma unroll
    for (int d = 0; d < 4; ++d) {
      const float2* angle = angles(a, r, d / 2 * 16) + d % 2 * 8 + lane % 4 * 2;
#pragma unroll
      for (int i = 0; i < 2; ++i) turn_back(s.v[d][2 * half + i], s.v[d + 4][2 * half + i], angle[i]);
    }
  }
}
// Rows of a 16-row tile, times scale0 (upper 8) and scale1.
template <class T>
__device__ inline void store_sum(Rows<u16> dst, const Sum& s, int row0, int n, float scale0, float scale1) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int r = row0 + lane / 4 + half * 8;
    if (r >= n) continue;
    const float scale = half ? scale1 : scale0;
#pragma unroll
    for (int d = 0; d < 8; ++d)
      *reinterpret_cast<uint32_t*>(dst[r] + d * 8 + lane % 4 * 2) = pack<T>(s.v[d][2 * half] * scale, s.v[d][2 * half + 1] * scale);
  }
}

// s[16 kTiles, 8 kColumns] = A X^T, X the rows row0 .. of the tile
template <class T, int kColumns>
__device__ inline void product_transposed(float (&s)[kTiles][kColumns][4], const Operand (&a)[kTiles], u16* tile, int row0) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int j = 0; j < kColumns; ++j) {
#pragma unroll
    for (int t = 0; t < kTiles; ++t) s[t][j][0] = s[t][j][1] = s[t][j][2] = s[t][j][3] = 0.f;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t b[4];
      ldmatrix(b, cell(tile, row0 + j * 8, lane % 8, half * 4 + lane / 8));
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        mma<T>(s[t][j], a[t].v[2 * half], b[0], b[1]);
        mma<T>(s[t][j], a[t].v[2 * half + 1], b[2], b[3]);
      }
    }
  }
}
// sum[16 kTiles, 64] += P X, P[16 kTiles, 8 kColumns]: the accumulators of one product are the operand of the next, lane by lane
template <class T, int kColumns>
__device__ inline void product_add(Sum (&sum)[kTiles], const float (&p)[kTiles][kColumns][4], u16* tile, int row0) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int k = 0; k < kColumns / 2; ++k) {
    uint32_t a[kTiles][4];
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      a[t][0] = pack<T>(p[t][2 * k][0], p[t][2 * k][1]);
      a[t][1] = pack<T>(p[t][2 * k][2], p[t][2 * k][3]);
      a[t][2] = pack<T>(p[t][2 * k + 1][0], p[t][2 * k + 1][1]);
      a[t][3] = pack<T>(p[t][2 * k + 1][2], p[t][2 * k + 1][3]);
    }
#pragma unroll
    for (int d = 0; d < 4; ++d) {
      uint32_t b[4];
      ldmatrix_trans(b, cell(tile, row0 + k * 16, lane % 16, d * 2 + lane / 16));
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        mma<T>(sum[t].v[2 * d], a[t], b[0], b[1]);
        mma<T>(sum[t].v[2 * d + 1], a[t], b[2], b[3]);
      }
    }
  }
}
// The columns at and past `left` belong to no token.
template <int kColumns>
__device__ inline void mask(float (&s)[kTiles][kColumns][4], int column0, int left, float value) {
  if (column0 + 8 * kColumns <= left) return;
#pragma unroll
  for (int t = 0; t < kTiles; ++t)
#pragma unroll
    for (int j = 0; j < kColumns; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (column0 + j * 8 + static_cast<int>(threadIdx.x) % 4 * 2 + (i & 1) >= left) s[t][j][i] = value;
}

// ------------------------------------------------------------------ forward

template <class T>
struct Softmax {
  Sum o[kTiles];
  float m[kTiles][2], l[kTiles][2];                                      // reference score and sum of a row

  // The reference follows the row's maximum only when that has grown by more than kSlack (2^8 is harmless in P and in the sum), so the
  // output is seldom rescaled: at N 261 about once.
  static constexpr float kSlack = 8.f / kScoreScale;

  template <int kColumns>
  __device__ inline void step(const Operand (&q)[kTiles], u16* ks, u16* vs, int k0, int left) {
    float s[kTiles][kColumns][4];
    product_transposed<T, kColumns>(s, q, ks, k0);
    mask(s, k0, left, -INFINITY);
    float top[kTiles][2];
    bool grown = false;
#pragma unroll
    for (int t = 0; t < kTiles; ++t)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float x = s[t][0][2 * half];
#pragma unroll
        for (int j = 0; j < kColumns; ++j) x = fmaxf(x, fmaxf(s[t][j][2 * half], s[t][j][2 * half + 1]));
        top[t][half] = quad_max(x);
        grown |= top[t][half] > m[t][half] + kSlack;
      }
    if (__any_sync(~0u, grown)) {
#pragma unroll
      for (int t = 0; t < kTiles; ++t)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float next = fmaxf(m[t][half], top[t][half]);
          const float shrink = m[t][half] == next ? 1.f : fast_exp2((m[t][half] - next) * kScoreScale);
          m[t][half] = next;
          l[t][half] *= shrink;
#pragma unroll
          for (int d = 0; d < 8; ++d) {
            o[t].v[d][2 * half] *= shrink;
            o[t].v[d][2 * half + 1] *= shrink;
          }
        }
    }
#pragma unroll
    for (int t = 0; t < kTiles; ++t)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float shift = m[t][half] == -INFINITY ? 0.f : m[t][half] * kScoreScale;
#pragma unroll
        for (int j = 0; j < kColumns; ++j)
#pragma unroll
          for (int i = 2 * half; i < 2 * half + 2; ++i) {
            s[t][j][i] = fast_exp2(s[t][j][i] * kScoreScale - shift);
            l[t][half] += s[t][j][i];
          }
      }
    product_add<T, kColumns>(o, s, vs, k0);
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads, 3) forward_kernel(const Attention a) {
  u16* ks = shared_memory<u16>();
  u16* vs = ks + kChunk * D;
  const Place p = place(a, kRowsOfBlock);
  const u16* qkv = static_cast<const u16*>(a.qkv);
  const int lane = threadIdx.x % 32, row0 = p.tile * kRowsOfBlock + threadIdx.x / 32 * 16 * kTiles;
  Operand q[kTiles];
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
    load_operand(q[t], qkv_rows(qkv, a, p, 0), row0 + t * 16, a.N);
    turn_operand<T>(q[t], row0 + t * 16, a);
  }
  Softmax<T> softmax;
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
    softmax.o[t] = Sum{};
    softmax.m[t][0] = softmax.m[t][1] = -INFINITY;
    softmax.l[t][0] = softmax.l[t][1] = 0.f;
  }
  for (int base = 0; base < a.N; base += kChunk) {
    const int left = a.N - base < kChunk ? a.N - base : kChunk, rows = (left + 15) / 16 * 16;
    if (base) __syncthreads();                                           // the last chunk is still being read
    load_tile(vs, qkv_rows(qkv, a, p, 2), base, rows, a.N);
    load_tile_of_pairs(ks, qkv_rows(qkv, a, p, 1), base, rows, a.N);
    copy_async_wait();
    turn_tile<T>(ks, base, rows, a);
    __syncthreads();
    if (row0 >= a.N) continue;                                           // not return: the barriers need every warp
    int k0 = 0;
    for (; k0 + kStep <= rows; k0 += kStep) softmax.template step<kStep / 8>(q, ks, vs, k0, left);
    if (k0 < rows) softmax.template step<2>(q, ks, vs, k0, left);
  }
  if (row0 >= a.N) return;
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      softmax.l[t][half] = quad_sum(softmax.l[t][half]);
      const int r = row0 + t * 16 + lane / 4 + half * 8;
      if (lane % 4 == 0 && r < a.N) a.lse[stat_row(a, p) + r] = softmax.m[t][half] * kScoreScale + log2f(softmax.l[t][half]);
    }
    store_sum<T>(out_rows(static_cast<u16*>(a.o), a, p), softmax.o[t], row0 + t * 16, a.N, 1.f / softmax.l[t][0], 1.f / softmax.l[t][1]);
  }
}

// ------------------------------------------------------------------ backward

template <class T, int kColumns>
__device__ inline void step_q(Sum (&dq)[kTiles], const Operand (&q)[kTiles], const Operand (&g)[kTiles], const float (&lse)[kTiles][2],
                              const float (&delta)[kTiles][2], u16* ks, u16* vs, int k0, int left) {
  float s[kTiles][kColumns][4], dp[kTiles][kColumns][4];
  product_transposed<T, kColumns>(s, q, ks, k0);
  product_transposed<T, kColumns>(dp, g, vs, k0);
#pragma unroll
  for (int t = 0; t < kTiles; ++t)
#pragma unroll
    for (int j = 0; j < kColumns; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) s[t][j][i] = fast_exp2(s[t][j][i] * kScoreScale - lse[t][i >> 1]) * (dp[t][j][i] - delta[t][i >> 1]);
  mask(s, k0, left, 0.f);
  product_add<T, kColumns>(dq, s, ks, k0);
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2) backward_q_kernel(const Attention a) {
  u16* ks = shared_memory<u16>();
  u16* vs = ks + kChunk * D;
  const Place p = place(a, kRowsOfBlock);
  const u16* qkv = static_cast<const u16*>(a.qkv);
  const int lane = threadIdx.x % 32, row0 = p.tile * kRowsOfBlock + threadIdx.x / 32 * 16 * kTiles;
  Operand q[kTiles], g[kTiles];
  Sum dq[kTiles];
  float lse[kTiles][2], delta[kTiles][2];
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
    load_operand(g[t], out_rows(static_cast<const u16*>(a.dout), a, p), row0 + t * 16, a.N);
    load_operand(q[t], out_rows(static_cast<const u16*>(a.out), a, p), row0 + t * 16, a.N);              // O first
    delta[t][0] = delta[t][1] = 0.f;
#pragma unroll
    for (int k = 0; k < 4; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 x = unpack<T>(g[t].v[k][i]), y = unpack<T>(q[t].v[k][i]);
        delta[t][i & 1] += x.x * y.x + x.y * y.y;
      }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      delta[t][half] = quad_sum(delta[t][half]);
      const int r = row0 + t * 16 + lane / 4 + half * 8;
      lse[t][half] = r < a.N ? a.lse[stat_row(a, p) + r] : 0.f;
      if (lane % 4 == 0 && r < a.N) a.delta[stat_row(a, p) + r] = delta[t][half];
    }
    load_operand(q[t], qkv_rows(qkv, a, p, 0), row0 + t * 16, a.N);
    turn_operand<T>(q[t], row0 + t * 16, a);
    dq[t] = Sum{};
  }
  for (int base = 0; base < a.N; base += kChunk) {
    const int left = a.N - base < kChunk ? a.N - base : kChunk, rows = (left + 15) / 16 * 16;
    if (base) __syncthreads();
    load_tile(vs, qkv_rows(qkv, a, p, 2), base, rows, a.N);
    load_tile_of_pairs(ks, qkv_rows(qkv, a, p, 1), base, rows, a.N);
    copy_async_wait();
    turn_tile<T>(ks, base, rows, a);
    __syncthreads();
    if (row0 >= a.N) continue;
    for (int k0 = 0; k0 < rows; k0 += kStepBackward) step_q<T, kStepBackward / 8>(dq, q, g, lse, delta, ks, vs, k0, left);
  }
  if (row0 >= a.N) return;
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
    turn_back_sum(dq[t], row0 + t * 16, a);
    store_sum<T>(qkv_rows(static_cast<u16*>(a.dqkv), a, p, 0), dq[t], row0 + t * 16, a.N, kScale, kScale);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2) backward_kv_kernel(const Attention a) {
  u16* qs = shared_memory<u16>();
  u16* gs = qs + kChunk * D;
  float* lse = reinterpret_cast<float*>(gs + kChunk * D);
  float* delta = lse + kChunk;
  const Place p = place(a, kRowsOfBlock);
  const u16* qkv = static_cast<const u16*>(a.qkv);
  const int lane = threadIdx.x % 32, row0 = p.tile * kRowsOfBlock + threadIdx.x / 32 * 16 * kTiles;
  Operand k[kTiles], v[kTiles];
  Sum dk[kTiles], dv[kTiles];
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
    load_operand(k[t], qkv_rows(qkv, a, p, 1), row0 + t * 16, a.N);
    load_operand(v[t], qkv_rows(qkv, a, p, 2), row0 + t * 16, a.N);
    turn_operand<T>(k[t], row0 + t * 16, a);
    dk[t] = dv[t] = Sum{};
  }
  for (int base = 0; base < a.N; base += kChunk) {
    const int left = a.N - base < kChunk ? a.N - base : kChunk, rows = (left + 15) / 16 * 16;
    if (base) __syncthreads();
    load_tile(gs, out_rows(static_cast<const u16*>(a.dout), a, p), base, rows, a.N);
    for (int i = threadIdx.x; i < rows; i += kThreads) {
      lse[i] = i < left ? a.lse[stat_row(a, p) + base + i] : 0.f;        // the padding weighs 1, times rows of zeros
      delta[i] = i < left ? a.delta[stat_row(a, p) + base + i] : 0.f;
    }
    load_tile_of_pairs(qs, qkv_rows(qkv, a, p, 0), base, rows, a.N);
    copy_async_wait();
    turn_tile<T>(qs, base, rows, a);
    __syncthreads();
    if (row0 >= a.N) continue;
    for (int q0 = 0; q0 < rows; q0 += kStepBackward) {
      float s[kTiles][kStepBackward / 8][4], ds[kTiles][kStepBackward / 8][4];
      product_transposed<T, kStepBackward / 8>(s, k, qs, q0);
      product_transposed<T, kStepBackward / 8>(ds, v, gs, q0);
#pragma unroll
      for (int j = 0; j < kStepBackward / 8; ++j) {
        const int column = q0 + j * 8 + lane % 4 * 2;
        const float2 l = *reinterpret_cast<const float2*>(lse + column), d = *reinterpret_cast<const float2*>(delta + column);
#pragma unroll
        for (int t = 0; t < kTiles; ++t)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            s[t][j][i] = fast_exp2(s[t][j][i] * kScoreScale - (i & 1 ? l.y : l.x));
            ds[t][j][i] = s[t][j][i] * (ds[t][j][i] - (i & 1 ? d.y : d.x));
          }
      }
      product_add<T, kStepBackward / 8>(dv, s, gs, q0);
      product_add<T, kStepBackward / 8>(dk, ds, qs, q0);
    }
  }
  if (row0 >= a.N) return;
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
    turn_back_sum(dk[t], row0 + t * 16, a);
    store_sum<T>(qkv_rows(static_cast<u16*>(a.dqkv), a, p, 1), dk[t], row0 + t * 16, a.N, kScale, kScale);
    store_sum<T>(qkv_rows(static_cast<u16*>(a.dqkv), a, p, 2), dv[t], row0 + t * 16, a.N, 1.f, 1.f);
  }
}

template <class T>
const char* forward(const Attention& a, void* stream) {
  return launch(forward_kernel<T>, blocks(a, kRowsOfBlock), kThreads, kTwoTiles, stream, a);
}
template <class T>
const char* backward(const Attention& a, void* stream) {
  const char* error = launch(backward_q_kernel<T>, blocks(a, kRowsOfBlock), kThreads, kTwoTiles, stream, a);
  if (error) return error;
  return launch(backward_kv_kernel<T>, blocks(a, kRowsOfBlock), kThreads,
                kTwoTiles + 2 * kChunk * sizeof(float), stream, a);
}
}  // namespace

const char* attention_forward_fp32(const Attention& a, void* stream);
const char* attention_backward_fp32(const Attention& a, void* stream);

const char* attention_forward(const Attention& a, void* stream) {
  if (a.type == Type::f32) return attention_forward_fp32(a, stream);
  return a.type == Type::bf16 ? forward<bf16_t>(a, stream) : forward<fp16_t>(a, stream);
}
const char* attention_backward(const Attention& a, void* stream) {
  if (a.type == Type::f32) return attention_backward_fp32(a, stream);
  return a.type == Type::bf16 ? backward<bf16_t>(a, stream) : backward<fp16_t>(a, stream);
}

}  // namespace cuda
}  // namespace sae
