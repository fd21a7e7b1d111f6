// The Gaussian bottleneck and the mean squared error: each one pass over memory, forward and backward.
//
//   forward   z = mu + exp(logvar / 2) eps                                        reads mu, logvar; writes z
//             KL = 1/2 sum(mu^2 + var - 1 - logvar)
//   backward  d mu = dz + dkl mu                                                  reads dz, mu, logvar
//             d logvar = dz std eps / 2 + dkl (var - 1) / 2                       writes d mu, d logvar
//   error     mean (a - b)^2;  da = 2 dmean (a - b) / n                           reads a, b; writes da
//
// All four kernels have one shape. A block of 256 threads takes 4096 elements of one sample in two passes, a
// thread 8 neighbouring ones at a time:
//   load the 8 values of each input, by 16 bytes
//   reparameterize only: draw their noise from its counter (noise.h): two blocks of Philox, four normals each
//   compute in fp32; store the 8 values of each output, by 16 bytes
//   forward: add to the thread's sum; after both passes
//     add up over lanes by shuffles and over warps in shared memory, in fp32, and write the sum as a double
//     a second kernel adds up the doubles of a sample, always in the same order: no atomics
//
// eps is computed where it is needed, so no noise is stored, read, or kept for backward: at [16,1280,16,16]
// in bf16 forward moves 31 MB and backward 52 MB. Backward needs mu and logvar.
//
// Grid: a block of 256 threads for every 4096 elements of every sample. Shared memory: 32 bytes in forward,
// and 2 KB in the kernel that adds up the doubles.
// Registers (sm_90): at most 64, which allows four blocks to a multiprocessor.
//
// The fast path wants samples of a multiple of 8 elements and an offset of a multiple of 4; anything else
// takes one element at a time.
#include <cmath>
#include <cstring>

#include "vector.cuh"

namespace sae {
namespace cuda {
namespace {

template <class To, class From>
SAE_INLINE To bits(From v) {
  To to;
  memcpy(&to, &v, sizeof(to));
  return to;
}
template <class C, class T>
SAE_INLINE T select(C c, T a, T b) { return c ? a : b; }
SAE_INLINE float to_float(int32_t v) { return static_cast<float>(v); }
SAE_INLINE float fused(float a, float b, float c) { return __fmaf_rn(a, b, c); }
SAE_INLINE float square_root(float v) { return __fsqrt_rn(v); }
SAE_INLINE uint32_t mul_wide(uint32_t m, uint32_t v, uint32_t& high) {
  high = __umulhi(m, v);
  return m * v;
}
#include "noise.h"

constexpr int kThreads = 256;
constexpr int64_t kPass = kThreads * kEach;                   // elements of a block at a time
static_assert(kChunk % kPass == 0, "");

SAE_INLINE void normals_of(uint64_t block, PhiloxKey key, float (&eps)[4]) {
  uint32_t words[1][4] = {{static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32), 0, 0}};
  philox(words, key);
  normals<float, int32_t>(words[0], eps);
}

// The noise of eight elements from `first` on. Off the fast path they may begin inside a block of Philox, and
// each is drawn by itself.
template <bool kFast>
SAE_INLINE Eight draw(uint64_t seed, uint64_t first) {
  const PhiloxKey key = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
  Eight eps;
  if constexpr (kFast) {
#pragma unroll
    for (int i = 0; i < kEach; i += 4) {
      float four[4];
      normals_of(first / 4 + i / 4, key, four);
#pragma unroll
      for (int j = 0; j < 4; ++j) eps.v[i + j] = four[j];
    }
  } else {
#pragma unroll 1
    for (int i = 0; i < kEach; ++i) {
      const int j = (first + i) % 4;
      float four[4];
      normals_of((first + i) / 4, key, four);
      // Not eps.v[i]: indexed by a variable the array would leave registers.
      const float v = j == 0 ? four[0] : j == 1 ? four[1] : j == 2 ? four[2] : four[3];
#pragma unroll
      for (int k = 0; k < kEach; ++k) eps.v[k] = k == i ? v : eps.v[k];
    }
  }
  return eps;
}

// A NaN passes both comparisons and stays.
SAE_INLINE float clamp_logvar(float v) { return v < -30.f ? -30.f : v > 20.f ? 20.f : v; }

// The sum over the block, in thread 0, in fp32.
SAE_INLINE float sum_of_warps(float v) {
  float* warp = shared_memory<float>();
#pragma unroll
  for (int m = 16; m; m >>= 1) v += __shfl_xor_sync(~0u, v, m);
  if (threadIdx.x % 32 == 0) warp[threadIdx.x / 32] = v;
  __syncthreads();
  float sum = 0.f;
  if (threadIdx.x == 0)
    for (int w = 0; w < kThreads / 32; ++w) sum += warp[w];
  return sum;
}
// out[block] = float(scale * sum of n doubles): always in the same order.
__global__ void __launch_bounds__(kThreads)
finish_kernel(const double* partial, int64_t n, double scale, float* out) {
  double s = 0.;
  for (int64_t i = threadIdx.x; i < n; i += kThreads) s += partial[blockIdx.x * n + i];
  const double sum = block_sum<kThreads>(s, shared_memory<double>());
  if (threadIdx.x == 0) out[blockIdx.x] = static_cast<float>(scale * sum);
}

struct Chunk {                                                // of a sample, that this block works on
  int64_t sample, begin, end;
};
SAE_INLINE Chunk chunk(int64_t n) {
  // There are fewer than 2^31 of them in all samples.
  const unsigned chunks = static_cast<unsigned>((n + kChunk - 1) / kChunk);
  const int64_t begin = blockIdx.x % chunks * kChunk;
  return {blockIdx.x / chunks, begin, n < begin + kChunk ? n : begin + kChunk};
}

template <class T, bool kFast>
__global__ void __launch_bounds__(kThreads) reparameterize_forward_kernel(const Gaussian a) {
  const Chunk c = chunk(a.n);
  float kl = 0.f;
  for (int64_t i = c.begin + threadIdx.x * kEach; i < c.end; i += kPass) {
    const int64_t at = c.sample * a.n + i;
    const int left = static_cast<int>(c.end - i);
    const Eight mu = load<kFast>(static_cast<const T*>(a.mu) + at, left);
    const Eight logvar = load<kFast>(static_cast<const T*>(a.logvar) + at, left);
    const Eight eps = draw<kFast>(a.seed, a.offset + at);
    Eight z;
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const float v = clamp_logvar(logvar.v[j]), std = expf(0.5f * v);
      z.v[j] = fused(std, eps.v[j], mu.v[j]);
      if (kFast || j < left) kl += fused(mu.v[j], mu.v[j], fused(std, std, -1.f) - v);
    }
    store<kFast>(static_cast<T*>(a.z) + at, z, left);
  }
  const float sum = sum_of_warps(kl);
  if (threadIdx.x == 0) a.partial[blockIdx.x] = sum;
}

template <class T, bool kFast>
__global__ void __launch_bounds__(kThreads) reparameterize_backward_kernel(const Gaussian a) {
  const Chunk c = chunk(a.n);
  const float dkl = a.dkl[c.sample];
  for (int64_t i = c.begin + threadIdx.x * kEach; i < c.end; i += kPass) {
    const int64_t at = c.sample * a.n + i;
    const int left = static_cast<int>(c.end - i);
    const Eight dz = load<kFast>(static_cast<const T*>(a.dz) + at, left);
    const Eight mu = load<kFast>(static_cast<const T*>(a.mu) + at, left);
    const Eight logvar = load<kFast>(static_cast<const T*>(a.logvar) + at, left);
    const Eight eps = draw<kFast>(a.seed, a.offset + at);
    Eight dmu, dlogvar;
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const float v = clamp_logvar(logvar.v[j]), std = expf(0.5f * v);
      dmu.v[j] = fused(dkl, mu.v[j], dz.v[j]);
      const float d = 0.5f * fused(dz.v[j] * std, eps.v[j], dkl * fused(std, std, -1.f));
      dlogvar.v[j] = logvar.v[j] > -30.f && logvar.v[j] < 20.f ? d : 0.f;  // of the clamp; none for a NaN
    }
    store<kFast>(static_cast<T*>(a.dmu) + at, dmu, left);
    store<kFast>(static_cast<T*>(a.dlogvar) + at, dlogvar, left);
  }
}

template <class T, bool kFast>
__global__ void __launch_bounds__(kThreads) squared_error_forward_kernel(const SquaredError e) {
  const Chunk c = chunk(e.n);
  float sum = 0.f;
  for (int64_t i = c.begin + threadIdx.x * kEach; i < c.end; i += kPass) {
    const int left = static_cast<int>(c.end - i);
    const Eight a = load<kFast>(static_cast<const T*>(e.a) + i, left);
    const Eight b = load<kFast>(static_cast<const T*>(e.b) + i, left);
#pragma unroll
    for (int j = 0; j < kEach; ++j) sum += (a.v[j] - b.v[j]) * (a.v[j] - b.v[j]);  // 0 past the end
  }
  const float total = sum_of_warps(sum);
  if (threadIdx.x == 0) e.partial[blockIdx.x] = total;
}

template <class T, bool kFast>
__global__ void __launch_bounds__(kThreads) squared_error_backward_kernel(const SquaredError e) {
  const Chunk c = chunk(e.n);
  const float scale = static_cast<float>(2. * *e.dmean / static_cast<double>(e.n));
  for (int64_t i = c.begin + threadIdx.x * kEach; i < c.end; i += kPass) {
    const int left = static_cast<int>(c.end - i);
    const Eight a = load<kFast>(static_cast<const T*>(e.a) + i, left);
    const Eight b = load<kFast>(static_cast<const T*>(e.b) + i, left);
    Eight d;
#pragma unroll
    for (int j = 0; j < kEach; ++j) d.v[j] = scale * (a.v[j] - b.v[j]);
    store<kFast>(static_cast<T*>(e.da) + i, d, left);
  }
}

constexpr size_t kWarpSums = kThreads / 32 * sizeof(float);
constexpr size_t kThreadSums = kThreads * sizeof(double);

// out[sample] = scale * the sum of the sample's partial sums
const char* finish(const double* partial, int64_t samples, int64_t n, double scale, float* out,
                   void* stream) {
  return launch(finish_kernel, samples, kThreads, kThreadSums, stream, partial, partials(n), scale, out);
}

}  // namespace

const char* reparameterize_forward(const Gaussian& a, void* stream) {
  const int64_t blocks = a.B * partials(a.n);
  const bool fast = a.n % kEach == 0 && a.offset % 4 == 0;
  const char* error =
      SAE_LAUNCH(reparameterize_forward_kernel, a.type, fast, blocks, kThreads, kWarpSums, stream, a);
  return error ? error : finish(a.partial, a.B, a.n, 0.5, a.kl, stream);
}
const char* reparameterize_backward(const Gaussian& a, void* stream) {
  const int64_t blocks = a.B * partials(a.n);
  const bool fast = a.n % kEach == 0 && a.offset % 4 == 0;
  return SAE_LAUNCH(reparameterize_backward_kernel, a.type, fast, blocks, kThreads, 0, stream, a);
}

const char* squared_error_forward(const SquaredError& e, void* stream) {
  const int64_t blocks = partials(e.n);
  const bool fast = e.n % kEach == 0;
  const char* error =
      SAE_LAUNCH(squared_error_forward_kernel, e.type, fast, blocks, kThreads, kWarpSums, stream, e);
  return error ? error : finish(e.partial, 1, e.n, 1. / static_cast<double>(e.n), e.mean, stream);
}
const char* squared_error_backward(const SquaredError& e, void* stream) {
  const int64_t blocks = partials(e.n);
  const bool fast = e.n % kEach == 0;
  return SAE_LAUNCH(squared_error_backward_kernel, e.type, fast, blocks, kThreads, 0, stream, e);
}

}  // namespace cuda
}  // namespace sae
