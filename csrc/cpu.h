// The CPU kernels, compiled once per instruction set (cpu_avx512bf16.cpp, cpu_avx512.cpp, ...) from cpu_kernels.h; ops.cpp
// takes the best one that the processor has. Every kernel works on one task of many, so ops.cpp alone knows about threads.
#pragma once
#include <cstddef>
#include <cstdint>

namespace sae {

enum class Type { f32, bf16, f16 };
constexpr int64_t kHeadDim = 64;

struct AttentionShape {
  int64_t B, N, H;         // images, tokens, heads
  int64_t prefix;          // tokens without a position
};

// Gaussian and MSE tasks cover this many elements of one sample. Fixed, so that sums do not depend on the thread count.
constexpr int64_t kChunk = 4096;
constexpr int64_t kNormChunk = 1 << 15;                       // of group norm: stays in the L2 cache for the second pass over it
constexpr int64_t kNormCache = 8 << 20;                       // bytes of samples whose passes follow one another

// Group norm works on channels_last memory, in chunks of whole rows of C channels.
struct NormShape {
  int64_t B, n, C, groups;   // samples, elements of one sample, channels
  int64_t columns;           // constants of a channel come every `columns` elements: a multiple of C and of 16, for whole vectors
  int64_t chunk;             // elements, a multiple of columns
};

struct CpuKernels {
  const char* name;
  // One task is one (image, head). angles: [N - prefix, 2, 32], the cosines and the sines of a token. lse: [B,H,N], base 2.
  size_t (*attention_scratch)(AttentionShape shape, bool backward);      // floats; the pointer must be aligned to 64 bytes
  void (*attention_forward)(AttentionShape shape, int64_t task, Type type, const void* qkv, const float* angles, void* out,
                            float* lse, float* scratch);
  void (*attention_backward)(AttentionShape shape, int64_t task, Type type, const void* dout, const void* qkv,
                             const float* angles, const void* out, const float* lse, void* dqkv, float* scratch);
  // n <= kChunk elements; the noise of the first one is element `first` of the stream. Returns the chunk's share of the KL.
  double (*reparameterize_forward)(Type type, const void* mu, const void* logvar, uint64_t seed, uint64_t first, int64_t n, void* z);
  // dkl: the gradient of this sample's KL.
  void (*reparameterize_backward)(Type type, const void* dz, float dkl, const void* mu, const void* logvar, uint64_t seed,
                                  uint64_t first, int64_t n, void* dmu, void* dlogvar);
  double (*squared_error)(Type type, const void* a, const void* b, int64_t n);                       // sum (a - b)^2
  void (*scaled_difference)(Type type, float scale, const void* a, const void* b, int64_t n, void* d);  // d = scale (a - b)
  // n <= chunk elements; scratch: [3, columns] floats. Of each group: mean, sum of squared deviations from it.
  void (*group_norm_moments)(const NormShape& shape, Type type, const void* x, int64_t n, float* scratch, double* mean,
                             double* square);
  // constants [3, columns]: mean, rstd weight, bias
  void (*group_norm_forward)(const NormShape& shape, Type type, const void* x, int64_t n, const float* constants, void* y);
  // du = dy silu'(u); sums [2, C]: of du, of du (x - mean)
  void (*group_norm_sums)(const NormShape& shape, Type type, const void* dy, const void* x, int64_t n, const float* constants,
                          float* scratch, float* du, float* sums);
  // dx = rstd weight du - offset - slope (x - mean); constants [5, columns]: mean, rstd weight, bias, offset, slope; dx may be du
  void (*group_norm_backward)(const NormShape& shape, Type type, const float* du, const void* x, int64_t n, const float* constants,
                              void* dx);
};

extern const CpuKernels kCpuAvx512Bf16, kCpuAvx512, kCpuAvx2, kCpuGeneric;

}  // namespace sae
