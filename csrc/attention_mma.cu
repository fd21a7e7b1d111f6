// O = softmax(Q K^T / 8) V for bf16 and fp16 on tensor cores, Q and K turned by RoPE, and its backward, from
// the packed projection [B,N,3,H,64]. Read attention_fp32.cu first: it is the same without tensor cores.
//
// A warp owns 16 rows in registers and streams the other side, which lies in shared memory:
//   forward   owns queries, streams K, V     S = Q K^T, online softmax, O += P V        writes O, lse
//   dQ        owns queries, streams K, V     P = 2^(S - lse), dS = P (dO V^T - delta),
//                                            dQ += dS K                                 writes dQ, delta
//   dK, dV    owns keys, streams Q, dO       S^T = K Q^T, dV += P^T dO,
//                                            dP^T = V dO^T, dK += dS^T Q                writes dK, dV
// with delta = rowsum(dO O). Each result has one writer: no atomics, always the same bits. Backward needs
// qkv, O and lse, and computes P again.
//
// Why not a general flash attention: N is 261 = 2 * 128 + 5 at 256 x 256 pixels. Tiles of 128 do 384 x 384 of
// work for 261 x 261. Here rows come in steps of 16 on both sides, which makes 272 x 272, and all of a head's
// K and V fit in shared memory.
//
// Grid: a block of 6 warps for every 96 rows of every (image, head): N 261 takes 3 blocks; one warp idles.
// Shared memory: 272 rows of both streamed tensors, 68 KB; a longer side comes in several chunks.
// Registers (sm_90): forward 162, dQ 154, dK and dV 168: two blocks a multiprocessor, 12 warps. One of sm_80
//   has room for two as well, and one of sm_86 or sm_89, with its 100 KB of shared memory, for one.
// A warp that owns 32 rows halves what ldmatrix reads, but only 9 and 6 of them find room: on an H100 forward
//   took 69 us instead of 59, backward 185 instead of 154 (B 16, N 261, H 20); what `load_tile` and
//   follow_maximum save brought forward to 52. What limits now is the L1 cache with its shared memory, busy
//   67 % of the time in forward and 77 % in dK and dV.
// Bytes there: forward reads 32 and writes 11 MB (14 us at an H100's 3.0 TB/s); backward moves twice as many.
//   RoPE and attention of eager PyTorch move three times as many.
//
// RoPE costs no pass over memory: Q turns in registers, where the pair (i, i + 32) sits in one lane; K turns
// in shared memory; dQ and dK turn back before they are stored. What is streamed comes by cp.async, the first
// chunk while the owned rows are loaded.
//
// The product of tensor cores, mma.m16n8k16: D[16,8] += A[16,16] B[16,8], spread over the lanes L0 .. L31 of
// a warp. With r = lane / 4 and c = lane % 4 a lane holds
//   a0 = A[r][2c, 2c+1], a1 8 rows below, a2 8 columns to the right, a3 both
//   b0 = B[2c, 2c+1][r], b1 8 rows below
//   d0 d1 = D[r][2c, 2c+1], d2 d3 8 rows below
//
//           A: 4 registers of 2 values               B: 2 registers              D: 4 floats
//       k   0 1   2 3   4 5   6 7 | 8 9 .. 14 15    n   0    1  ..  7      n   0 1   2 3   4 5   6 7
//   row 0   L0    L1    L2    L3  | L0  ..  L3    k 0   L0   L4 .. L28  row 0  L0    L1    L2    L3
//   row 1   L4    L5    L6    L7  | L4  ..  L7    k 1   L0   L4 .. L28  row 1  L4    L5    L6    L7
//    ..         register a0       |     a2        k 2   L1   L5 .. L29   ..         d0 d1
//   row 7   L28   L29   L30   L31 | L28 ..  L31    ..      b0           row 7  L28   L29   L30   L31
//   ------------------------------+------------   k 7   L3   L7 .. L31  -------------------------------
//   row 8   L0    L1    L2    L3  | L0  ..  L3    -------------------   row 8  L0    L1    L2    L3
//    ..         register a1       |     a3        k 8   L0   L4 .. L28   ..         d2 d3
//   row 15  L28   L29   L30   L31 | L28 ..  L31    ..      b1           row 15 L28   L29   L30   L31
//
// So the D of two products side by side, [16,16], packed to 16 bits, is the A of a next product, lane by
// lane: P never leaves the registers between S = Q K^T and O += P V.
#include "attention.cuh"

namespace sae {
namespace cuda {
namespace {

using u16 = uint16_t;
constexpr int kWarps = 6, kThreads = 32 * kWarps;
constexpr int kRowsOfBlock = 16 * kWarps;                     // 96: N 261 takes three blocks
#ifndef SAE_CHUNK_ROWS
#define SAE_CHUNK_ROWS 272                                    // N 261 in one piece; tests take fewer
#endif
constexpr int kChunkRows = SAE_CHUNK_ROWS;                    // streamed rows in shared memory at a time
static_assert(kChunkRows % 16 == 0, "");                      // a chunk's rows are rounded up to 16
// Keys or queries that a warp takes of a chunk at a time, in forward and in backward.
constexpr int kStep = 64, kStepBackward = 16;
constexpr size_t kTwoTiles = 2 * kChunkRows * D * sizeof(u16);

// The first of the 16 rows that this warp owns.
__device__ inline int first_row(const Place& p) { return p.tile * kRowsOfBlock + threadIdx.x / 32 * 16; }

// ------------------------------------------------------------------ shared memory: rows of 128 bytes

// A row is 8 cells of 16 bytes. XOR with the row's number moves its cells, so that the 8 rows of one column,
// which ldmatrix reads together, lie in all 32 banks. row0 must be a multiple of 8.
__device__ inline u16* cell(u16* tile, int row0, int row, int column) {
  return tile + (row0 + row) * D + ((column ^ (row & 7)) << 3);
}

// Rows first .. first + rows - 1 of src -> tile; zeros past row n. A thread copies one column of every
// kThreads / 8th row: a multiple of 8, so that `cell` moves them all alike.
__device__ inline void load_tile(u16* tile, Rows<const u16> src, int first, int rows, int n) {
  constexpr int kRows = kThreads / 8;                         // at a time
  static_assert(kRows % 8 == 0, "");
  const int c = threadIdx.x % 8;
  int r = threadIdx.x / 8;
  u16* to = cell(tile, 0, r, c);
  const u16* from = src[first + r] + c * 8;
  for (; r < rows; r += kRows, to += kRows * D, from += kRows * src.stride)
    copy_async(to, from, first + r < n);
}
// Rows in the order 0 4 1 5 2 6 3 7, eight by eight. Shared memory serves eight lanes of 16 bytes at a time;
// where four of them share a row, they take two rows, which must lie in the two halves of the banks: `cell`
// sees to it if bit 2 of the rows differs.
__device__ inline int spread(int row) { return (row & ~7) | (row & 1) << 2 | (row & 7) >> 1; }
// As load_tile, for `turn_tile`: a thread copies the very cells that it will turn, so it waits for its own
// copies alone, and no barrier is needed in between.
__device__ inline void load_tile_of_pairs(u16* tile, Rows<const u16> src, int first, int rows, int n) {
  constexpr int kRows = kThreads / 4;
  const int c = threadIdx.x % 4;
  int r = spread(threadIdx.x / 4);
  u16 *low = cell(tile, 0, r, c), *high = cell(tile, 0, r, c + 4);
  const u16* from = src[first + r] + c * 8;
  for (; r < rows; r += kRows, low += kRows * D, high += kRows * D, from += kRows * src.stride) {
    copy_async(low, from, first + r < n);
    copy_async(high, from + 32, first + r < n);
  }
}

// Two pairs: the values of `low` are the first ones, those of `high` the second ones.
template <class T>
__device__ inline void turn_pairs(uint32_t& low, uint32_t& high, float2 angle0, float2 angle1) {
  float2 x = unpack<T>(low), y = unpack<T>(high);
  turn(x.x, y.x, angle0);
  turn(x.y, y.y, angle1);
  low = pack<T>(x.x, x.y);
  high = pack<T>(y.x, y.y);
}

// RoPE of a tile in shared memory, in place, after it has landed: so all its copies are under way at once,
// and no register waits for one.
template <class T>
__device__ inline void turn_tile(u16* tile, int first, int rows, const Attention& a) {
  constexpr int kRows = kThreads / 4;                         // at a time
  const int c = threadIdx.x % 4;
  int r = spread(threadIdx.x / 4), x = first + r - a.prefix;
  int y = x > 0 ? x / a.w : 0;                                // row and column of the patch
  x -= y * a.w;
  uint4* low = reinterpret_cast<uint4*>(cell(tile, 0, r, c));
  uint4* high = reinterpret_cast<uint4*>(cell(tile, 0, r, c + 4));
  for (; r < rows && first + r < a.N; r += kRows, x += kRows, low += kRows * 8, high += kRows * 8) {
    for (; x >= a.w; x -= a.w) ++y;
    if (x < 0) continue;                                      // CLS and registers have no position
    const float4* angle = reinterpret_cast<const float4*>(angles(a, y, x, c * 8));
    const float4 p = angle[0], q = angle[1], u = angle[2], v = angle[3];
    uint4 e = *low, f = *high;
    turn_pairs<T>(e.x, f.x, make_float2(p.x, p.y), make_float2(p.z, p.w));
    turn_pairs<T>(e.y, f.y, make_float2(q.x, q.y), make_float2(q.z, q.w));
    turn_pairs<T>(e.z, f.z, make_float2(u.x, u.y), make_float2(u.z, u.w));
    turn_pairs<T>(e.w, f.w, make_float2(v.x, v.y), make_float2(v.z, v.w));
    *low = e;
    *high = f;
  }
}

// ------------------------------------------------------------------ registers: 16 rows of 64 values

struct Operand { uint32_t v[4][4]; };                         // four A side by side: [step of k][register]
struct Sum { float v[8][4]; };                                // eight D side by side: [8 columns][register]

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

// Columns c and c + 32 are two steps of k apart, in the same register of the same lane.
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
      for (int i = 0; i < 2; ++i)
        turn_pairs<T>(f.v[k][2 * i + half], f.v[k + 2][2 * i + half], angle[8 * i], angle[8 * i + 1]);
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

// The rows of s below n, times scale0 (rows 0-7) and scale1 (rows 8-15).
template <class T>
__device__ inline void store_sum(Rows<u16> dst, const Sum& s, int row0, int n, float scale0, float scale1) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int r = row0 + lane / 4 + half * 8;
    if (r >= n) continue;
    const float scale = half ? scale1 : scale0;
#pragma unroll
    for (int d = 0; d < 8; ++d) {
      const uint32_t two = pack<T>(s.v[d][2 * half] * scale, s.v[d][2 * half + 1] * scale);
      *reinterpret_cast<uint32_t*>(dst[r] + d * 8 + lane % 4 * 2) = two;
    }
  }
}

// ------------------------------------------------------------------ products of a warp

// What a product of the warp's 16 rows and 8 kColumns streamed ones gives: [8 columns][register].
template <int kColumns>
using Scores = float[kColumns][4];

// s[16, 8 kColumns] = A X^T with X the tile's rows from row0 on.
// B[k][n] = X[n][k]: a lane wants two neighbours of a row of X, which ldmatrix gives.
template <class T, int kColumns>
__device__ inline void product_transposed(Scores<kColumns>& s, const Operand& a, u16* tile, int row0) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int j = 0; j < kColumns; ++j) {
    s[j][0] = s[j][1] = s[j][2] = s[j][3] = 0.f;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t b[4];                                          // the B of two steps of k
      ldmatrix(b, cell(tile, row0 + j * 8, lane % 8, half * 4 + lane / 8));
      mma<T>(s[j], a.v[2 * half], b[0], b[1]);
      mma<T>(s[j], a.v[2 * half + 1], b[2], b[3]);
    }
  }
}

// sum[16, 64] += P X, P[16, 8 kColumns]. P is packed from D to A, lane by lane.
// B[k][n] = X[k][n]: a lane wants two neighbours of a column of X, so ldmatrix transposes.
template <class T, int kColumns>
__device__ inline void product_add(Sum& sum, const Scores<kColumns>& p, u16* tile, int row0) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int k = 0; k < kColumns / 2; ++k) {
    const float(&left)[4] = p[2 * k], (&right)[4] = p[2 * k + 1];
    const uint32_t a[4] = {pack<T>(left[0], left[1]), pack<T>(left[2], left[3]),
                           pack<T>(right[0], right[1]), pack<T>(right[2], right[3])};
#pragma unroll
    for (int d = 0; d < 4; ++d) {
      uint32_t b[4];                                          // the B of two products side by side
      ldmatrix_trans(b, cell(tile, row0 + k * 16, lane % 16, d * 2 + lane / 16));
      mma<T>(sum.v[2 * d], a, b[0], b[1]);
      mma<T>(sum.v[2 * d + 1], a, b[2], b[3]);
    }
  }
}

// s = value in the columns from `left` on, which are padding. s begins at column `column0`.
template <int kColumns>
__device__ inline void mask(Scores<kColumns>& s, int column0, int left, float value) {
  if (column0 + 8 * kColumns <= left) return;
  const int column = column0 + threadIdx.x % 4 * 2;
#pragma unroll
  for (int j = 0; j < kColumns; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (column + j * 8 + (i & 1) >= left) s[j][i] = value;
}

// ------------------------------------------------------------------ forward

// In the formulas of this file S and m are in base 2. In the code s and m are raw dot products: kScoreScale
// multiplies them where exp2 or lse takes them, in backward too.

// Of the 16 rows: the output so far, and of each row its reference score m and the sum l of 2^(s - m).
template <class T>
struct Softmax {
  Sum o;
  float m[2], l[2];                                           // of two rows, 8 apart

  // m follows the maxima only when that of some row has grown by more than kSlack (2^8 is harmless in P and
  // in the sum), so the output is seldom rescaled: at N 261 about once.
  static constexpr float kSlack = 8.f / kScoreScale;

  __device__ inline void reset() {
    o = Sum{};
    m[0] = m[1] = -INFINITY;
    l[0] = l[1] = 0.f;
  }

  // 8 kColumns keys, the rows from k0 on of the tiles:
  //   S = Q K^T, -infinity past the last key
  //   if any of the warp's 16 rows has its maximum above its m + slack, then in every row
  //     next = max(m, maximum);  l and o shrink by 2^(m - next);  m = next
  //   P = 2^(S - m);  l += a lane's share of rowsum P;  o += P V
  template <int kColumns>
  __device__ inline void step(const Operand& q, u16* ks, u16* vs, int k0, int left) {
    Scores<kColumns> s;
    product_transposed<T, kColumns>(s, q, ks, k0);
    mask<kColumns>(s, k0, left, -INFINITY);
    follow_maximum<kColumns>(s);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float shift = m[half] == -INFINITY ? 0.f : m[half] * kScoreScale;
#pragma unroll
      for (int j = 0; j < kColumns; ++j)
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          s[j][i] = fast_exp2(s[j][i] * kScoreScale - shift);
          l[half] += s[j][i];
        }
    }
    product_add<T, kColumns>(o, s, vs, k0);
  }

  // A lane compares what it holds of a row; the row's four lanes meet only when m moves.
  template <int kColumns>
  __device__ inline void follow_maximum(const Scores<kColumns>& s) {
    float top[2];
    bool grown = false;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float x = s[0][2 * half];
#pragma unroll
      for (int j = 0; j < kColumns; ++j) x = fmaxf(x, fmaxf(s[j][2 * half], s[j][2 * half + 1]));
      top[half] = x;
      grown |= x > m[half] + kSlack;
    }
    if (!__any_sync(~0u, grown)) return;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float next = fmaxf(m[half], quad_max(top[half]));
      const float shrink = m[half] == next ? 1.f : fast_exp2((m[half] - next) * kScoreScale);
      m[half] = next;
      l[half] *= shrink;
#pragma unroll
      for (int d = 0; d < 8; ++d) {
        o.v[d][2 * half] *= shrink;
        o.v[d][2 * half + 1] *= shrink;
      }
    }
  }
};

// A warp owns 16 queries:
//   for each chunk of 272 keys:
//     K, V -> shared memory, by the whole block; K turned there
//     the first time, while they are under way: Q -> registers, turned
//     for each 64 keys of it: Softmax::step
//   l = sum of the shares of the row's four lanes
//   O = o / l;  lse = m + log2 l
template <class T>
__global__ void __launch_bounds__(kThreads, 2) forward_kernel(const Attention a) {
  u16* ks = shared_memory<u16>();
  u16* vs = ks + kChunkRows * D;
  const Place p = place(a, kRowsOfBlock);
  const u16* qkv = static_cast<const u16*>(a.qkv);
  const int lane = threadIdx.x % 32, row0 = first_row(p);

  Operand q;
  Softmax<T> softmax;
  softmax.reset();

  for (int base = 0; base < a.N; base += kChunkRows) {
    const int left = a.N - base < kChunkRows ? a.N - base : kChunkRows, rows = (left + 15) / 16 * 16;
    if (base) __syncthreads();                                // the last chunk is still being read
    load_tile_of_pairs(ks, qkv_rows(qkv, a, p, 1), base, rows, a.N);
    load_tile(vs, qkv_rows(qkv, a, p, 2), base, rows, a.N);
    if (!base) {
      load_operand(q, qkv_rows(qkv, a, p, 0), row0, a.N);
      turn_operand<T>(q, row0, a);
    }
    copy_async_wait();
    turn_tile<T>(ks, base, rows, a);
    __syncthreads();

    if (row0 >= a.N) continue;                                // not return: the barriers need every warp
    int k0 = 0;
    for (; k0 + kStep <= rows; k0 += kStep) softmax.template step<kStep / 8>(q, ks, vs, k0, left);
    for (; k0 < rows; k0 += 16) softmax.template step<2>(q, ks, vs, k0, left);
  }

  if (row0 >= a.N) return;
  const float(&m)[2] = softmax.m;
  float(&l)[2] = softmax.l;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    l[half] = quad_sum(l[half]);
    const int r = row0 + lane / 4 + half * 8;
    if (lane % 4 == 0 && r < a.N) a.lse[stat_row(a, p) + r] = m[half] * kScoreScale + log2f(l[half]);
  }
  store_sum<T>(out_rows(static_cast<u16*>(a.out), a, p), softmax.o, row0, a.N, 1.f / l[0], 1.f / l[1]);
}

// ------------------------------------------------------------------ backward

// 8 kColumns keys, the rows from k0 on of the tiles:
//   P = 2^(Q K^T - lse);  dP = dO V^T;  dS = P (dP - delta), 0 past the last key;  dQ += dS K
template <class T, int kColumns>
__device__ inline void step_q(Sum& dq, const Operand& q, const Operand& g, const float (&lse)[2],
                              const float (&delta)[2], u16* ks, u16* vs, int k0, int left) {
  Scores<kColumns> s, dp;
  product_transposed<T, kColumns>(s, q, ks, k0);
  product_transposed<T, kColumns>(dp, g, vs, k0);
#pragma unroll
  for (int j = 0; j < kColumns; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float weight = fast_exp2(s[j][i] * kScoreScale - lse[i >> 1]);
      s[j][i] = weight * (dp[j][i] - delta[i >> 1]);
    }
  mask<kColumns>(s, k0, left, 0.f);
  product_add<T, kColumns>(dq, s, ks, k0);
}

// A warp owns 16 queries:
//   for each chunk of 272 keys:
//     K, V -> shared memory, by the whole block; K turned there
//     the first time, while they are under way:
//       dO, O -> registers; delta = rowsum(dO O), written for the other kernel
//       Q -> registers, turned
//     for each 16 keys of it: step_q
//   dQ = dQ / 8, turned back
template <class T>
__global__ void __launch_bounds__(kThreads, 2) backward_q_kernel(const Attention a) {
  u16* ks = shared_memory<u16>();
  u16* vs = ks + kChunkRows * D;
  const Place p = place(a, kRowsOfBlock);
  const u16* qkv = static_cast<const u16*>(a.qkv);
  const int lane = threadIdx.x % 32, row0 = first_row(p);

  Operand q, g;
  Sum dq = Sum{};
  float lse[2], delta[2];
  const auto load_owned = [&] {
    load_operand(g, out_rows(static_cast<const u16*>(a.dout), a, p), row0, a.N);
    load_operand(q, out_rows(static_cast<const u16*>(a.out), a, p), row0, a.N);       // O first
    delta[0] = delta[1] = 0.f;
#pragma unroll
    for (int k = 0; k < 4; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 x = unpack<T>(g.v[k][i]), y = unpack<T>(q.v[k][i]);
        delta[i & 1] += x.x * y.x + x.y * y.y;
      }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      delta[half] = quad_sum(delta[half]);
      const int r = row0 + lane / 4 + half * 8;
      lse[half] = r < a.N ? a.lse[stat_row(a, p) + r] : 0.f;
      if (lane % 4 == 0 && r < a.N) a.delta[stat_row(a, p) + r] = delta[half];
    }
    load_operand(q, qkv_rows(qkv, a, p, 0), row0, a.N);
    turn_operand<T>(q, row0, a);
  };

  for (int base = 0; base < a.N; base += kChunkRows) {
    const int left = a.N - base < kChunkRows ? a.N - base : kChunkRows, rows = (left + 15) / 16 * 16;
    if (base) __syncthreads();
    load_tile_of_pairs(ks, qkv_rows(qkv, a, p, 1), base, rows, a.N);
    load_tile(vs, qkv_rows(qkv, a, p, 2), base, rows, a.N);
    if (!base) load_owned();
    copy_async_wait();
    turn_tile<T>(ks, base, rows, a);
    __syncthreads();

    if (row0 >= a.N) continue;
    for (int k0 = 0; k0 < rows; k0 += kStepBackward)
      step_q<T, kStepBackward / 8>(dq, q, g, lse, delta, ks, vs, k0, left);
  }

  if (row0 >= a.N) return;
  turn_back_sum(dq, row0, a);
  store_sum<T>(qkv_rows(static_cast<u16*>(a.dqkv), a, p, 0), dq, row0, a.N, kScale, kScale);
}

// 8 kColumns queries, the rows from q0 on of the tiles:
//   P^T = 2^(K Q^T - lse);  dS^T = P^T (V dO^T - delta);  dV += P^T dO;  dK += dS^T Q
// A lane's columns are queries here, so lse and delta come from shared memory by pairs.
template <class T, int kColumns>
__device__ inline void step_kv(Sum& dk, Sum& dv, const Operand& k, const Operand& v, const float* lse,
                               const float* delta, u16* qs, u16* gs, int q0) {
  Scores<kColumns> s, ds;
  product_transposed<T, kColumns>(s, k, qs, q0);
  product_transposed<T, kColumns>(ds, v, gs, q0);
#pragma unroll
  for (int j = 0; j < kColumns; ++j) {
    const int column = q0 + j * 8 + threadIdx.x % 4 * 2;
    const float2 l = *reinterpret_cast<const float2*>(lse + column);
    const float2 d = *reinterpret_cast<const float2*>(delta + column);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      s[j][i] = fast_exp2(s[j][i] * kScoreScale - (i & 1 ? l.y : l.x));
      ds[j][i] = s[j][i] * (ds[j][i] - (i & 1 ? d.y : d.x));
    }
  }
  product_add<T, kColumns>(dv, s, gs, q0);
  product_add<T, kColumns>(dk, ds, qs, q0);
}

// A warp owns 16 keys:
//   for each chunk of 272 queries:
//     Q, dO, lse, delta -> shared memory, by the whole block; Q turned there
//     the first time, while they are under way: K, V -> registers, K turned
//     for each 16 queries of it: step_kv
//   dK = dK / 8, turned back
template <class T>
__global__ void __launch_bounds__(kThreads, 2) backward_kv_kernel(const Attention a) {
  u16* qs = shared_memory<u16>();
  u16* gs = qs + kChunkRows * D;
  float* lse = reinterpret_cast<float*>(gs + kChunkRows * D);
  float* delta = lse + kChunkRows;
  const Place p = place(a, kRowsOfBlock);
  const u16* qkv = static_cast<const u16*>(a.qkv);
  const int row0 = first_row(p);

  Operand k, v;
  Sum dk = Sum{}, dv = Sum{};

  for (int base = 0; base < a.N; base += kChunkRows) {
    const int left = a.N - base < kChunkRows ? a.N - base : kChunkRows, rows = (left + 15) / 16 * 16;
    if (base) __syncthreads();
    load_tile_of_pairs(qs, qkv_rows(qkv, a, p, 0), base, rows, a.N);
    load_tile(gs, out_rows(static_cast<const u16*>(a.dout), a, p), base, rows, a.N);
    for (int i = threadIdx.x; i < rows; i += kThreads) {      // the padding weighs 1, times rows of zeros
      lse[i] = i < left ? a.lse[stat_row(a, p) + base + i] : 0.f;
      delta[i] = i < left ? a.delta[stat_row(a, p) + base + i] : 0.f;
    }
    if (!base) {
      load_operand(k, qkv_rows(qkv, a, p, 1), row0, a.N);
      load_operand(v, qkv_rows(qkv, a, p, 2), row0, a.N);
      turn_operand<T>(k, row0, a);
    }
    copy_async_wait();
    turn_tile<T>(qs, base, rows, a);
    __syncthreads();

    if (row0 >= a.N) continue;
    for (int q0 = 0; q0 < rows; q0 += kStepBackward)
      step_kv<T, kStepBackward / 8>(dk, dv, k, v, lse, delta, qs, gs, q0);
  }

  if (row0 >= a.N) return;
  turn_back_sum(dk, row0, a);
  store_sum<T>(qkv_rows(static_cast<u16*>(a.dqkv), a, p, 1), dk, row0, a.N, kScale, kScale);
  store_sum<T>(qkv_rows(static_cast<u16*>(a.dqkv), a, p, 2), dv, row0, a.N, 1.f, 1.f);
}

template <class T>
const char* forward(const Attention& a, void* stream) {
  return launch(forward_kernel<T>, blocks(a, kRowsOfBlock), kThreads, kTwoTiles, stream, a);
}
template <class T>
const char* backward(const Attention& a, void* stream) {
  const int64_t n = blocks(a, kRowsOfBlock);
  const size_t with_lse_and_delta = kTwoTiles + 2 * kChunkRows * sizeof(float);
  if (const char* error = launch(backward_q_kernel<T>, n, kThreads, kTwoTiles, stream, a)) return error;
  return launch(backward_kv_kernel<T>, n, kThreads, with_lse_and_delta, stream, a);
}

}  // namespace

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
