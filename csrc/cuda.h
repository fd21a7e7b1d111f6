// The CUDA kernels' entry points, without a header of torch or CUDA, so that ops.cpp, the .cu files and emulate.cpp share them.
// Each launches on `stream` and returns nullptr, or what CUDA said. Pointers must be aligned to 16 bytes.
#pragma once
#include <cstdint>

#include "cpu.h"

namespace sae {
namespace cuda {

struct Attention {
  Type type;
  int64_t B;
  int N, H, prefix, h, w;          // N = prefix + h w
  const float *rows, *cols;        // [h,16,2], [w,16,2]: (cos, sin)
  const void *qkv, *out, *dout;    // [B,N,3,H,64], [B,N,H,64], [B,N,H,64]
  void *o, *dqkv;                  // written by forward, by backward
  float *lse, *delta;              // [B,H,N]; lse in base 2, written by forward; delta is backward's scratch
};
const char* attention_forward(const Attention& a, void* stream);
const char* attention_backward(const Attention& a, void* stream);

struct Gaussian {
  Type type;
  int64_t B, n;                    // samples, elements of one sample
  uint64_t seed, offset;
  const void *mu, *logvar, *dz;    // [B,n]
  const float* dkl;                // [B]
  void *z, *dmu, *dlogvar;
  float* kl;                       // [B]
  double* partial;                 // scratch of partials(n) doubles a sample
};
int64_t partials(int64_t n);       // chunks of kChunk elements
const char* reparameterize_forward(const Gaussian& a, void* stream);
const char* reparameterize_backward(const Gaussian& a, void* stream);

struct SquaredError {
  Type type;
  int64_t n;
  const void *a, *b;
  float* mean;                     // forward
  double* partial;                 // scratch of partials(n) doubles
  const float* dmean;              // backward: da = 2 dmean (a - b) / n
  void* da;
};
const char* squared_error_forward(const SquaredError& a, void* stream);
const char* squared_error_backward(const SquaredError& a, void* stream);

struct GroupNorm {                 // of channels_last memory: rows of C channels
  Type type;
  int64_t B, rows;                 // samples, rows of one sample
  int C, groups;
  double eps;
  const void *x, *dy;              // [B,rows,C]
  const float *weight, *bias;      // [C]
  float *mean, *rstd;              // [B,groups], written by forward
  void *y, *dx;                    // [B,rows,C], written by forward, by backward
  float *dweight, *dbias;          // [C]
  float* partial;                  // scratch of norm_partials(a) floats
  double* sums;                    // backward's scratch: [B,2,C]
  float* slope;                    // backward's scratch: [B,2,groups]
};
int64_t norm_partials(const GroupNorm& a);
const char* group_norm_silu_forward(const GroupNorm& a, void* stream);
const char* group_norm_silu_backward(const GroupNorm& a, void* stream);

}  // namespace cuda
}  // namespace sae
