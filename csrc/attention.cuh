// What the attention kernels share: where a head's rows lie, and how RoPE turns a pair of values.
//
// RoPE: pair i of a row is the values i and i + 32, and turns by the angle i of the token's patch: pairs 0-15
// by the patch's row on the grid, 16-31 by its column. The first `prefix` tokens have no position and stay.
#pragma once
#include "kernels.h"
#include "ptx.cuh"

namespace sae {
namespace cuda {
namespace {

constexpr int D = kHeadDim;
constexpr float kScale = 0.125f;                              // 1 / sqrt(64)
constexpr float kLog2e = 1.4426950408889634f;
constexpr float kScoreScale = kScale * kLog2e;                // scores in base 2: softmax by exp2

// A block works on rows tile * rows .. tile * rows + rows - 1 of one (image, head). Tiles of a head are
// neighbours, so its K and V stay in the L2 cache.
struct Place {
  int tile, head;
  int64_t image;
};
__device__ inline Place place(const Attention& a, int rows) {
  const int tiles = (a.N + rows - 1) / rows;
  const int64_t task = blockIdx.x / tiles;
  return {int(blockIdx.x % tiles), int(task % a.H), task / a.H};
}
inline int64_t blocks(const Attention& a, int rows) { return a.B * a.H * ((a.N + rows - 1) / rows); }

template <class E>
struct Rows {                                                 // row t: 64 values at base + t * stride
  E* base;
  int64_t stride;
  __device__ E* operator[](int t) const { return base + t * stride; }
};
template <class E>
__device__ inline Rows<E> qkv_rows(E* qkv, const Attention& a, const Place& p, int which) {  // [B,N,3,H,64]
  const int64_t stride = int64_t(3) * a.H * D;
  return {qkv + p.image * a.N * stride + (int64_t(which) * a.H + p.head) * D, stride};
}
template <class E>
__device__ inline Rows<E> out_rows(E* out, const Attention& a, const Place& p) {  // [B,N,H,64]
  const int64_t stride = int64_t(a.H) * D;
  return {out + p.image * a.N * stride + p.head * D, stride};
}
// Where the head's row of lse and delta begins, [B,H,N].
__device__ inline int64_t stat_row(const Attention& a, const Place& p) {
  return (p.image * a.H + p.head) * a.N;
}

// Points to the (cos, sin) of pair i of the patch in row y and column x, or of a token that is a patch. Those
// of the next pairs follow, up to the next multiple of 16.
__device__ inline const float2* angles(const Attention& a, int y, int x, int i) {
  return reinterpret_cast<const float2*>(i < 16 ? a.rows + y * 32 : a.cols + x * 32) + i % 16;
}
__device__ inline const float2* angles(const Attention& a, int token, int i) {
  const int patch = token - a.prefix, y = patch / a.w, x = patch - y * a.w;
  return angles(a, y, x, i);
}
// (x, y) = (v[i], v[i + 32]) turns by the angle; `turn_back` by minus it.
__device__ inline void turn(float& x, float& y, float2 angle) {
  const float t = x * angle.x - y * angle.y;
  y = y * angle.x + x * angle.y;
  x = t;
}
__device__ inline void turn_back(float& x, float& y, float2 angle) {
  turn(x, y, make_float2(angle.x, -angle.y));
}

__device__ inline float quad_max(float v) {
  v = fmaxf(v, __shfl_xor_sync(~0u, v, 1));
  return fmaxf(v, __shfl_xor_sync(~0u, v, 2));
}
__device__ inline float quad_sum(float v) {
  v += __shfl_xor_sync(~0u, v, 1);
  return v + __shfl_xor_sync(~0u, v, 2);
}

}  // namespace
}  // namespace cuda
}  // namespace sae
