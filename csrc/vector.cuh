// Shared by the kernels that stream tensors through registers (gaussian.cu, norm.cu): a thread works on eight
// neighbouring values, which it loads by 16 bytes where the shape allows it and one by one elsewhere.
#pragma once
#include "kernels.h"
#include "ptx.cuh"

#define SAE_INLINE __device__ __forceinline__

namespace sae {
namespace cuda {
namespace {

constexpr int kEach = 8;

// Pointers are to global memory. On the fast path they are aligned to 16 bytes; the other path reads or
// writes the first n values alone. No kernel writes what it loads here (__ldg), or reads what it stores.
struct Eight { float v[kEach]; };
SAE_INLINE Eight load(const float* p) {
  const float4* const from = reinterpret_cast<const float4*>(p);
  const float4 x = __ldg(from), y = __ldg(from + 1);
  return {{x.x, x.y, x.z, x.w, y.x, y.y, y.z, y.w}};
}
SAE_INLINE void store(float* p, const Eight& e) {
#pragma unroll
  for (int i = 0; i < kEach; i += 4)
    store_16(p + i, __float_as_uint(e.v[i]), __float_as_uint(e.v[i + 1]), __float_as_uint(e.v[i + 2]),
             __float_as_uint(e.v[i + 3]));
}
template <class T>
SAE_INLINE Eight load(const T* p) {
  const uint4 x = __ldg(reinterpret_cast<const uint4*>(p));
  const float2 a = unpack<T>(x.x), b = unpack<T>(x.y), c = unpack<T>(x.z), d = unpack<T>(x.w);
  return {{a.x, a.y, b.x, b.y, c.x, c.y, d.x, d.y}};
}
template <class T>
SAE_INLINE void store(T* p, const Eight& e) {
  store_16(p, pack<T>(e.v[0], e.v[1]), pack<T>(e.v[2], e.v[3]), pack<T>(e.v[4], e.v[5]),
           pack<T>(e.v[6], e.v[7]));
}
SAE_INLINE float load_one(const float* p) { return *p; }
template <class T>
SAE_INLINE float load_one(const T* p) { return unpack<T>(p->bits).x; }
SAE_INLINE void store_one(float* p, float v) { *p = v; }
template <class T>
SAE_INLINE void store_one(T* p, float v) { p->bits = static_cast<uint16_t>(pack<T>(v, 0.f)); }
template <bool kFast, class T>
SAE_INLINE Eight load(const T* p, int n) {
  if constexpr (kFast) {
    return load(p);
  } else {
    Eight e{};
#pragma unroll
    for (int i = 0; i < kEach; ++i)
      if (i < n) e.v[i] = load_one(p + i);
    return e;
  }
}
template <bool kFast, class T>
SAE_INLINE void store(T* p, const Eight& e, int n) {
  if constexpr (kFast) {
    store(p, e);
  } else {
#pragma unroll
    for (int i = 0; i < kEach; ++i)
      if (i < n) store_one(p + i, e.v[i]);
  }
}

// The sum over a block of n threads, in every thread: always in the same order. shared has room for n.
template <int n>
SAE_INLINE double block_sum(double v, double* shared) {
  static_assert((n & (n - 1)) == 0, "");                      // halved until 1 is left
  __syncthreads();
  shared[threadIdx.x] = v;
  for (int half = n / 2; half; half /= 2) {
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < half) shared[threadIdx.x] += shared[threadIdx.x + half];
  }
  __syncthreads();
  return shared[0];
}

// launch(kernel<T, fast>, blocks, threads, shared, stream, arguments...) for a type that is known at run time
#define SAE_LAUNCH(kernel, type, fast, ...)                                                        \
  (type == Type::f32    ? launch(fast ? kernel<float, true> : kernel<float, false>, __VA_ARGS__)   \
   : type == Type::bf16 ? launch(fast ? kernel<bf16_t, true> : kernel<bf16_t, false>, __VA_ARGS__) \
                        : launch(fast ? kernel<fp16_t, true> : kernel<fp16_t, false>, __VA_ARGS__))

}  // namespace
}  // namespace cuda
}  // namespace sae
