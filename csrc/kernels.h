// The kernels' arguments and their entry points on both devices. No header of torch or CUDA comes in, so
// ops.cpp, the CPU files, the .cu files and the tests' emulation of a GPU can share this one.
#pragma once
#include <cstdint>

namespace sae {

enum class Type { f32, bf16, f16 };

constexpr int64_t kHeadDim = 64;

// The Gaussian ops and the squared error work on chunks of this many elements of one sample. It is fixed, so
// that the order of a sum, and with it its last bit, depends on neither the threads nor the device's size.
constexpr int64_t kChunk = 4096;
inline int64_t partials(int64_t n) { return (n + kChunk - 1) / kChunk; }  // chunks of n elements

struct Attention {
  Type type;
  int64_t B;
  int N, H, prefix, h, w;          // N = prefix + h w; the first `prefix` tokens have no position
  const float *rows, *cols;        // [h,16,2], [w,16,2]: (cos, sin)
  const void *qkv, *dout;          // [B,N,3,H,64], [B,N,H,64]
  void *out, *dqkv;                // out is written by forward and read by backward
  float *lse, *delta;              // [B,H,N]; lse (base 2) like out; delta is scratch of the CUDA backward
};

struct Gaussian {
  Type type;
  int64_t B, n;                    // samples, elements of one sample
  uint64_t seed, offset;           // the noise of element i is element offset + i of the stream `seed`
  const void *mu, *logvar, *dz;    // [B,n]
  const float* dkl;                // [B]
  void *z, *dmu, *dlogvar;         // [B,n]
  float* kl;                       // [B]
  double* partial;                 // scratch of forward: [B, partials(n)]
};

struct SquaredError {
  Type type;
  int64_t n;
  const void *a, *b;               // [n]
  float* mean;                     // [1], written by forward
  double* partial;                 // scratch of forward: [partials(n)]
  const float* dmean;              // [1]
  void* da;                        // [n], written by backward: 2 dmean (a - b) / n
};

struct GroupNorm {                 // of channels_last memory: rows of C channels
  Type type;
  int64_t B, rows;                 // samples, rows of one sample
  int C, groups;
  double eps;
  const void *x, *dy;              // [B,rows,C]
  const float *weight, *bias;      // [C]
  float *mean, *rstd;              // [B,groups], written by forward and read by backward
  void *y, *dx;                    // [B,rows,C], written by forward, by backward
  float *dweight, *dbias;          // [C]
  float* partial;                  // scratch of the CUDA kernels: [cuda::norm_partials(a)]
  double* sums;                    // scratch of backward: [B,2,C]
  float* slope;                    // scratch of backward: [B,2,groups]
};

namespace cpu {                    // cpu_ops.cpp
const char* instruction_set();     // the best one of this processor that was compiled for
void attention_forward(const Attention& a);
void attention_backward(const Attention& a);
void reparameterize_forward(const Gaussian& a);
void reparameterize_backward(const Gaussian& a);
void squared_error_forward(const SquaredError& e);
void squared_error_backward(const SquaredError& e);
void group_norm_silu_forward(const GroupNorm& a);
void group_norm_silu_backward(const GroupNorm& a);
}  // namespace cpu

// Each launches on `stream` and returns nullptr, or what CUDA said. Tensors must be aligned to 16 bytes.
namespace cuda {
const char* attention_forward(const Attention& a, void* stream);          // attention_mma.cu
const char* attention_backward(const Attention& a, void* stream);
const char* attention_forward_fp32(const Attention& a, void* stream);  // attention_fp32.cu, for the two above
const char* attention_backward_fp32(const Attention& a, void* stream);
const char* reparameterize_forward(const Gaussian& a, void* stream);      // gaussian.cu
const char* reparameterize_backward(const Gaussian& a, void* stream);
const char* squared_error_forward(const SquaredError& e, void* stream);
const char* squared_error_backward(const SquaredError& e, void* stream);
const char* group_norm_silu_forward(const GroupNorm& a, void* stream);    // norm.cu
const char* group_norm_silu_backward(const GroupNorm& a, void* stream);
int64_t norm_partials(const GroupNorm& a);
}  // namespace cuda

}  // namespace sae
