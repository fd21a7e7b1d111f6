// The CPU kernels. They are compiled once for each instruction set (cpu_avx2.cpp and its neighbours, from
// cpu_isa.h), and cpu_ops.cpp takes the best ones that the processor has. A kernel works on one task of many
// and knows nothing of threads: cpu_ops.cpp cuts an op into tasks and shares them out.
#pragma once
#include <cstddef>
#include <cstdint>

#include "kernels.h"

namespace sae {

// How the CPU cuts group norm: into chunks of whole rows of C channels.
struct NormCut {
  int64_t n;        // elements of one sample
  int64_t columns;  // a multiple of C and of 16: the channels' constants come again every `columns` elements,
                    // and are read by whole vectors
  int64_t chunk;    // elements of one chunk, a multiple of columns
};

struct CpuKernels {
  const char* name;

  // A task is one (image, head). angles: [h w, 2, 32], the cosines, then the sines of a patch.
  // scratch: attention_scratch floats, aligned to 64 bytes.
  size_t (*attention_scratch)(const Attention& a, bool backward);
  void (*attention_forward)(const Attention& a, int64_t task, const float* angles, float* scratch);
  void (*attention_backward)(const Attention& a, int64_t task, const float* angles, float* scratch);

  // A task is the elements first .. first + n - 1 of one sample, n <= kChunk.
  // Forward returns their share of the KL.
  double (*reparameterize_forward)(const Gaussian& a, int64_t sample, int64_t first, int64_t n);
  void (*reparameterize_backward)(const Gaussian& a, int64_t sample, int64_t first, int64_t n);

  // The same for tensors as a whole. Forward returns the sum of (a - b)^2.
  double (*squared_error_forward)(const SquaredError& e, int64_t first, int64_t n);
  void (*squared_error_backward)(const SquaredError& e, int64_t first, int64_t n);

  // A task is the elements first .. first + n - 1 of x, at most one chunk.
  // With u = (x - mean) rstd weight + bias:
  //   moments    of each group: its mean, and its sum of squared deviations; scratch [3, columns]
  //   forward    y = u sigmoid(u); constants [3, columns]: mean, rstd weight, bias
  //   sums       du = dy silu'(u), and of each channel sum du and sum du (x - mean); scratch [2, columns]
  //   backward   dx = rstd weight du - (offset + slope (x - mean));
  //              constants [5, columns]: those of forward, offset, slope; du may lie where dx does
  void (*group_norm_moments)(const GroupNorm& a, const NormCut& cut, int64_t first, int64_t n, float* scratch,
                             double* mean, double* square);
  void (*group_norm_forward)(const GroupNorm& a, const NormCut& cut, int64_t first, int64_t n,
                             const float* constants);
  void (*group_norm_sums)(const GroupNorm& a, const NormCut& cut, int64_t first, int64_t n,
                          const float* constants, float* scratch, float* du, float* sums);
  void (*group_norm_backward)(const GroupNorm& a, const NormCut& cut, int64_t first, int64_t n,
                              const float* constants, const float* du);
};

extern const CpuKernels kCpuAvx512Bf16, kCpuAvx512, kCpuAvx2, kCpuGeneric;

}  // namespace sae
