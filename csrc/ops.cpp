// torch.ops.sae: checks, allocation, the choice of the kernel and the threads. Uses libtorch's stable ABI only, so one binary
// serves every torch from 2.11 on. Autograd and the shape functions for torch.compile are registered in sae.py.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cpu.h"
#include "cuda.h"

namespace sae {
extern const int64_t kSourceCrc;                              // of csrc, written by setup.py

namespace {
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void check(bool ok, const char* message) {
  if (!ok) throw std::runtime_error(message);
}
Type type_of(const Tensor& t) {
  const ScalarType s = t.scalar_type();
  check(s == ScalarType::Float || s == ScalarType::BFloat16 || s == ScalarType::Half, "sae: tensors must be float32, bfloat16 or float16");
  return s == ScalarType::Float ? Type::f32 : s == ScalarType::BFloat16 ? Type::bf16 : Type::f16;
}
bool same_place(const Tensor& a, const Tensor& b) { return a.is_cuda() == b.is_cuda() && a.get_device_index() == b.get_device_index(); }
bool same_shape(const Tensor& a, const Tensor& b) {
  bool same = a.dim() == b.dim();
  for (int64_t i = 0; same && i < a.dim(); ++i) same = a.size(i) == b.size(i);
  return same;
}
void check_pair(const Tensor& a, const Tensor& b) {
  check(same_shape(a, b) && a.scalar_type() == b.scalar_type() && same_place(a, b), "sae: tensors must agree in shape, dtype and device");
}
// Contiguous, and aligned for 16-byte loads (a view may start anywhere in its storage).
Tensor dense(const Tensor& t) {
  Tensor c = torch::stable::contiguous(t);
  return reinterpret_cast<uintptr_t>(c.data_ptr()) % 16 ? torch::stable::clone(c) : c;
}
Tensor like(const Tensor& t, std::vector<int64_t> size, ScalarType type) { return torch::stable::new_empty(t, size, type); }
Tensor like(const Tensor& t) { return torch::stable::new_empty(t, {t.sizes().begin(), t.sizes().end()}); }
float* floats(const Tensor& t) { return static_cast<float*>(t.data_ptr()); }

// ------------------------------------------------------------------ CPU

const CpuKernels& cpu() {
  static const CpuKernels& best = [&]() -> const CpuKernels& {
#if defined(__x86_64__)
    const char* most = std::getenv("SAE_CPU");                // avx512, avx2 or generic: for tests on a better processor
    const std::string limit = most ? most : "avx512bf16";
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (avx512 && __builtin_cpu_supports("avx512bf16") && limit == "avx512bf16") return kCpuAvx512Bf16;
    if (avx512 && limit != "avx2" && limit != "generic") return kCpuAvx512;
    if (avx2 && limit != "generic") return kCpuAvx2;
#endif
    return kCpuGeneric;
  }();
  return best;
}

struct Aligned {                                              // scratch floats, 64-byte aligned
  std::unique_ptr<float[]> memory;
  float* p;
  explicit Aligned(size_t n) : memory(new float[n + 16]) {
    p = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory.get()) + 63) / 64 * 64);
  }
};
template <class Body>
void parallel(int64_t tasks, Body body) {
  torch::stable::parallel_for(0, tasks, 1, body);
}

// [h,16,2] and [w,16,2] -> [h w, 2, 32]: the cosines, then the sines, of each patch
std::vector<float> angles_of_tokens(const Tensor& rows, const Tensor& cols) {
  const int64_t h = rows.size(0), w = cols.size(0);
  std::vector<float> angles(h * w * 64);
  for (int64_t t = 0; t < h * w; ++t)
    for (int64_t i = 0; i < 32; ++i)
      for (int64_t part = 0; part < 2; ++part)
        angles[t * 64 + part * 32 + i] = i < 16 ? floats(rows)[(t / w * 16 + i) * 2 + part] : floats(cols)[(t % w * 16 + i - 16) * 2 + part];
  return angles;
}

// The sum over chunks of each of B samples of n elements: body(sample, first element, count) -> double. Always the same order.
template <class Body>
std::vector<double> chunk_sums(int64_t B, int64_t n, Body body) {
  const int64_t chunks = (n + kChunk - 1) / kChunk;
  std::vector<double> part(B * chunks), sums(B, 0.0);
  parallel(B * chunks, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % chunks * kChunk;
      part[i] = body(i / chunks, first, n - first < kChunk ? n - first : kChunk);
    }
  });
  for (int64_t i = 0; i < B * chunks; ++i) sums[i / chunks] += part[i];
  return sums;
}
const char* at(const Tensor& t, int64_t element) { return static_cast<const char*>(t.data_ptr()) + element * t.element_size(); }
char* at_mutable(const Tensor& t, int64_t element) { return static_cast<char*>(t.data_ptr()) + element * t.element_size(); }

// ------------------------------------------------------------------ CUDA

#ifdef SAE_CUDA
template <class Args>
void launch(const char* (*kernel)(const Args&, void*), const Args& args, const Tensor& t) {
  const torch::stable::accelerator::DeviceGuard guard(t.get_device_index());
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  if (const char* error = kernel(args, stream)) throw std::runtime_error(std::string("sae: ") + error);
}
#endif

// ------------------------------------------------------------------ attention

AttentionShape attention_shape(const Tensor& qkv, const Tensor& rows, const Tensor& cols, int64_t prefix) {
  check(qkv.dim() == 5 && qkv.size(2) == 3 && qkv.size(4) == kHeadDim, "sae: qkv must be [B,N,3,H,64]");
  for (const Tensor* t : {&rows, &cols})
    check(t->dim() == 3 && t->size(1) == 16 && t->size(2) == 2 && t->scalar_type() == ScalarType::Float && same_place(*t, qkv),
          "sae: rope tables must be float32 [h,16,2] and [w,16,2] on the device of qkv");
  check(prefix >= 0 && qkv.size(1) == prefix + rows.size(0) * cols.size(0) && qkv.size(1) > 0, "sae: N must be prefix + h w, at least 1");
  return {qkv.size(0), qkv.size(1), qkv.size(3), prefix};
}

std::tuple<Tensor, Tensor> attention_cpu(const Tensor& qkv_, const Tensor& rows, const Tensor& cols, int64_t prefix) {
  const AttentionShape s = attention_shape(qkv_, rows, cols, prefix);
  const Type type = type_of(qkv_);
  const Tensor qkv = dense(qkv_), out = like(qkv, {s.B, s.N, s.H * kHeadDim}, qkv.scalar_type());
  const Tensor lse = like(qkv, {s.B, s.H, s.N}, ScalarType::Float);
  const std::vector<float> angles = angles_of_tokens(dense(rows), dense(cols));
  parallel(s.B * s.H, [&](int64_t begin, int64_t end) {
    const Aligned scratch(cpu().attention_scratch(s, false));
    for (int64_t i = begin; i < end; ++i)
      cpu().attention_forward(s, i, type, qkv.data_ptr(), angles.data(), out.data_ptr(), floats(lse), scratch.p);
  });
  return {out, lse};
}
Tensor attention_backward_cpu(const Tensor& dout_, const Tensor& qkv_, const Tensor& rows, const Tensor& cols, const Tensor& out_,
                              const Tensor& lse_, int64_t prefix) {
  const AttentionShape s = attention_shape(qkv_, rows, cols, prefix);
  const Type type = type_of(qkv_);
  check_pair(dout_, out_);
  check(out_.numel() * 3 == qkv_.numel() && out_.scalar_type() == qkv_.scalar_type() && lse_.numel() == s.B * s.H * s.N,
        "sae: dout, out and lse must be those of this qkv");
  const Tensor qkv = dense(qkv_), out = dense(out_), dout = dense(dout_), lse = dense(lse_), dqkv = like(qkv);
  const std::vector<float> angles = angles_of_tokens(dense(rows), dense(cols));
  parallel(s.B * s.H, [&](int64_t begin, int64_t end) {
    const Aligned scratch(cpu().attention_scratch(s, true));
    for (int64_t i = begin; i < end; ++i)
      cpu().attention_backward(s, i, type, dout.data_ptr(), qkv.data_ptr(), angles.data(), out.data_ptr(), floats(lse), dqkv.data_ptr(), scratch.p);
  });
  return dqkv;
}

#ifdef SAE_CUDA
cuda::Attention attention_args(const AttentionShape& s, const Tensor& qkv, const Tensor& rows, const Tensor& cols) {
  check(s.N < (1 << 24) && s.H < (1 << 20), "sae: attention takes less than 2^24 tokens");
  cuda::Attention a{};
  a.type = type_of(qkv);
  a.B = s.B, a.N = int(s.N), a.H = int(s.H), a.prefix = int(s.prefix), a.h = int(rows.size(0)), a.w = int(cols.size(0));
  a.rows = floats(rows), a.cols = floats(cols), a.qkv = qkv.data_ptr();
  return a;
}
std::tuple<Tensor, Tensor> attention_cuda(const Tensor& qkv_, const Tensor& rows_, const Tensor& cols_, int64_t prefix) {
  const AttentionShape s = attention_shape(qkv_, rows_, cols_, prefix);
  const Tensor qkv = dense(qkv_), rows = dense(rows_), cols = dense(cols_);
  const Tensor out = like(qkv, {s.B, s.N, s.H * kHeadDim}, qkv.scalar_type()), lse = like(qkv, {s.B, s.H, s.N}, ScalarType::Float);
  cuda::Attention a = attention_args(s, qkv, rows, cols);
  a.o = out.data_ptr(), a.lse = floats(lse);
  launch(cuda::attention_forward, a, qkv);
  return {out, lse};
}
Tensor attention_backward_cuda(const Tensor& dout_, const Tensor& qkv_, const Tensor& rows_, const Tensor& cols_, const Tensor& out_,
                               const Tensor& lse_, int64_t prefix) {
  const AttentionShape s = attention_shape(qkv_, rows_, cols_, prefix);
  check_pair(dout_, out_);
  check(out_.numel() * 3 == qkv_.numel() && out_.scalar_type() == qkv_.scalar_type() && lse_.numel() == s.B * s.H * s.N &&
            same_place(out_, qkv_) && same_place(lse_, qkv_),
        "sae: dout, out and lse must be those of this qkv");
  const Tensor qkv = dense(qkv_), rows = dense(rows_), cols = dense(cols_), out = dense(out_), dout = dense(dout_), lse = dense(lse_);
  const Tensor dqkv = like(qkv), delta = like(lse);
  cuda::Attention a = attention_args(s, qkv, rows, cols);
  a.out = out.data_ptr(), a.dout = dout.data_ptr(), a.lse = floats(lse), a.delta = floats(delta), a.dqkv = dqkv.data_ptr();
  launch(cuda::attention_backward, a, qkv);
  return dqkv;
}
#endif

// ------------------------------------------------------------------ Gaussian

int64_t samples(const Tensor& mu, const Tensor& logvar) {
  check_pair(mu, logvar);
  check(mu.dim() >= 2, "sae: mu must be [B,...]");
  return mu.size(0);
}
std::tuple<Tensor, Tensor> reparameterize_cpu(const Tensor& mu_, const Tensor& logvar_, int64_t seed, int64_t offset) {
  const int64_t B = samples(mu_, logvar_), n = B ? mu_.numel() / B : 0;
  const Type type = type_of(mu_);
  const Tensor mu = dense(mu_), logvar = dense(logvar_), z = like(mu), kl = like(mu, {B}, ScalarType::Float);
  const std::vector<double> sums = chunk_sums(B, n, [&](int64_t sample, int64_t first, int64_t count) {
    const int64_t i = sample * n + first;
    return cpu().reparameterize_forward(type, at(mu, i), at(logvar, i), seed, uint64_t(offset) + i, count, at_mutable(z, i));
  });
  for (int64_t i = 0; i < B; ++i) floats(kl)[i] = float(sums[i]);
  return {z, kl};
}
std::tuple<Tensor, Tensor> reparameterize_backward_cpu(const Tensor& dz_, const Tensor& dkl_, const Tensor& mu_, const Tensor& logvar_,
                                                       int64_t seed, int64_t offset) {
  const int64_t B = samples(mu_, logvar_), n = B ? mu_.numel() / B : 0;
  const Type type = type_of(mu_);
  check_pair(dz_, mu_);
  check(dkl_.numel() == B && dkl_.scalar_type() == ScalarType::Float, "sae: dkl must be float32 [B]");
  const Tensor dz = dense(dz_), dkl = dense(dkl_), mu = dense(mu_), logvar = dense(logvar_), dmu = like(mu), dlogvar = like(mu);
  chunk_sums(B, n, [&](int64_t sample, int64_t first, int64_t count) {
    const int64_t i = sample * n + first;
    cpu().reparameterize_backward(type, at(dz, i), floats(dkl)[sample], at(mu, i), at(logvar, i), seed, uint64_t(offset) + i, count,
                                  at_mutable(dmu, i), at_mutable(dlogvar, i));
    return 0.0;
  });
  return {dmu, dlogvar};
}

#ifdef SAE_CUDA
cuda::Gaussian gaussian_args(const Tensor& mu, const Tensor& logvar, int64_t seed, int64_t offset) {
  cuda::Gaussian a{};
  a.type = type_of(mu);
  a.B = mu.size(0), a.n = a.B ? mu.numel() / a.B : 0, a.seed = seed, a.offset = offset;
  a.mu = mu.data_ptr(), a.logvar = logvar.data_ptr();
  return a;
}
std::tuple<Tensor, Tensor> reparameterize_cuda(const Tensor& mu_, const Tensor& logvar_, int64_t seed, int64_t offset) {
  const int64_t B = samples(mu_, logvar_);
  const Tensor mu = dense(mu_), logvar = dense(logvar_), z = like(mu), kl = like(mu, {B}, ScalarType::Float);
  cuda::Gaussian a = gaussian_args(mu, logvar, seed, offset);
  const Tensor partial = like(mu, {B * cuda::partials(a.n)}, ScalarType::Double);
  a.z = z.data_ptr(), a.kl = floats(kl), a.partial = static_cast<double*>(partial.data_ptr());
  launch(cuda::reparameterize_forward, a, mu);
  return {z, kl};
}
std::tuple<Tensor, Tensor> reparameterize_backward_cuda(const Tensor& dz_, const Tensor& dkl_, const Tensor& mu_, const Tensor& logvar_,
                                                        int64_t seed, int64_t offset) {
  const int64_t B = samples(mu_, logvar_);
  check_pair(dz_, mu_);
  check(dkl_.numel() == B && dkl_.scalar_type() == ScalarType::Float && same_place(dkl_, mu_), "sae: dkl must be float32 [B]");
  const Tensor dz = dense(dz_), dkl = dense(dkl_), mu = dense(mu_), logvar = dense(logvar_), dmu = like(mu), dlogvar = like(mu);
  cuda::Gaussian a = gaussian_args(mu, logvar, seed, offset);
  a.dz = dz.data_ptr(), a.dkl = floats(dkl), a.dmu = dmu.data_ptr(), a.dlogvar = dlogvar.data_ptr();
  launch(cuda::reparameterize_backward, a, mu);
  return {dmu, dlogvar};
}
#endif

// ------------------------------------------------------------------ feature MSE

Tensor feature_mse_cpu(const Tensor& a_, const Tensor& b_) {
  check_pair(a_, b_);
  const Type type = type_of(a_);
  const Tensor a = dense(a_), b = dense(b_), mean = like(a, {}, ScalarType::Float);
  const double sum = chunk_sums(1, a.numel(), [&](int64_t, int64_t i, int64_t count) {
    return cpu().squared_error(type, at(a, i), at(b, i), count);
  })[0];
  floats(mean)[0] = float(sum / double(a.numel()));
  return mean;
}
Tensor feature_mse_backward_cpu(const Tensor& dmean, const Tensor& a_, const Tensor& b_) {
  check_pair(a_, b_);
  const Type type = type_of(a_);
  check(dmean.numel() == 1 && dmean.scalar_type() == ScalarType::Float, "sae: the gradient of the loss must be one float32");
  const Tensor a = dense(a_), b = dense(b_), da = like(a);
  const float scale = float(2.0 * floats(dmean)[0] / double(a.numel()));
  chunk_sums(1, a.numel(), [&](int64_t, int64_t i, int64_t count) {
    cpu().scaled_difference(type, scale, at(a, i), at(b, i), count, at_mutable(da, i));
    return 0.0;
  });
  return da;
}

#ifdef SAE_CUDA
Tensor feature_mse_cuda(const Tensor& a_, const Tensor& b_) {
  check_pair(a_, b_);
  const Tensor a = dense(a_), b = dense(b_), mean = like(a, {}, ScalarType::Float);
  const Tensor partial = like(a, {cuda::partials(a.numel())}, ScalarType::Double);
  cuda::SquaredError s{};
  s.type = type_of(a), s.n = a.numel(), s.a = a.data_ptr(), s.b = b.data_ptr(), s.mean = floats(mean);
  s.partial = static_cast<double*>(partial.data_ptr());
  launch(cuda::squared_error_forward, s, a);
  return mean;
}
Tensor feature_mse_backward_cuda(const Tensor& dmean, const Tensor& a_, const Tensor& b_) {
  check_pair(a_, b_);
  check(dmean.numel() == 1 && dmean.scalar_type() == ScalarType::Float && same_place(dmean, a_),
        "sae: the gradient of the loss must be one float32");
  const Tensor a = dense(a_), b = dense(b_), da = like(a);
  cuda::SquaredError s{};
  s.type = type_of(a), s.n = a.numel(), s.a = a.data_ptr(), s.b = b.data_ptr(), s.dmean = floats(dmean), s.da = da.data_ptr();
  launch(cuda::squared_error_backward, s, a);
  return da;
}
#endif

// ------------------------------------------------------------------ SiLU of group norm

// x: [B,...,C], channels last; weight, bias: float32 [C]
NormShape norm_shape(const Tensor& x, const Tensor& weight, const Tensor& bias, int64_t groups) {
  check(x.dim() >= 2 && x.size(-1) > 0, "sae: x must be [B,...,C] with C > 0");
  NormShape s{};
  s.B = x.size(0), s.n = s.B ? x.numel() / s.B : 0, s.C = x.size(-1), s.groups = groups;
  check(groups > 0 && s.C % groups == 0, "sae: C must be a multiple of groups");
  for (const Tensor* t : {&weight, &bias})
    check(t->dim() == 1 && t->size(0) == s.C && t->scalar_type() == ScalarType::Float && same_place(*t, x),
          "sae: weight and bias must be float32 [C] on the device of x");
  s.columns = std::lcm(s.C, int64_t(16));
  s.chunk = std::max(int64_t(1), kNormChunk / s.columns) * s.columns;
  return s;
}
void check_norm_backward(const NormShape& s, const Tensor& dy, const Tensor& x, const Tensor& mean, const Tensor& rstd) {
  check_pair(dy, x);
  for (const Tensor* t : {&mean, &rstd})
    check(t->numel() == s.B * s.groups && t->scalar_type() == ScalarType::Float && same_place(*t, x),
          "sae: mean and rstd must be those of this x");
}
int64_t chunks_of(const NormShape& s) { return (s.n + s.chunk - 1) / s.chunk; }

// body(sample, chunk of it, first element, elements, constants, scratch) for the chunks of samples first .. last - 1;
// prepare(sample, constants) comes before those of a sample.
template <class Prepare, class Body>
void for_chunks(const NormShape& s, int64_t first, int64_t last, Prepare prepare, Body body) {
  const int64_t chunks = chunks_of(s);
  parallel((last - first) * chunks, [&](int64_t begin, int64_t end) {
    const Aligned memory(8 * s.columns);
    float *constants = memory.p, *scratch = constants + 5 * s.columns;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t sample = first + i / chunks, chunk = i % chunks, element = chunk * s.chunk;
      if (i == begin || chunk == 0) prepare(sample, constants);
      body(sample, chunk, sample * s.n + element, std::min(s.chunk, s.n - element), constants, scratch);
    }
  });
}
// Both directions read their inputs twice, so they take as many samples at a time as a cache holds.
int64_t samples_at_once(const NormShape& s, int64_t bytes_of_element) {
  return std::max(int64_t(1), kNormCache / std::max(int64_t(1), s.n * bytes_of_element));
}
template <class Body>                                         // body(first, last) for all samples, `count` at a time
void for_samples(const NormShape& s, int64_t count, Body body) {
  for (int64_t first = 0; first < s.B; first += count) body(first, std::min(s.B, first + count));
}
// constants [columns] of a sample: value(c, g) for channel c of group g
template <class Value>
void fill_constants(const NormShape& s, float* constants, Value value) {
  const int64_t width = s.C / s.groups;
  for (int64_t g = 0; g < s.groups; ++g)
    for (int64_t c = g * width; c < (g + 1) * width; ++c) constants[c] = value(c, g);
  for (int64_t c = s.C; c < s.columns; ++c) constants[c] = constants[c - s.C];
}
// [3, columns]: mean, rstd weight, bias
void forward_constants(const NormShape& s, const float* mean, const float* rstd, const float* weight, const float* bias,
                       float* constants) {
  fill_constants(s, constants, [&](int64_t, int64_t g) { return mean[g]; });
  fill_constants(s, constants + s.columns, [&](int64_t c, int64_t g) { return rstd[g] * weight[c]; });
  fill_constants(s, constants + 2 * s.columns, [&](int64_t c, int64_t) { return bias[c]; });
}

std::tuple<Tensor, Tensor, Tensor> group_norm_silu_cpu(const Tensor& x_, const Tensor& weight_, const Tensor& bias_, int64_t groups,
                                                       double eps) {
  const NormShape s = norm_shape(x_, weight_, bias_, groups);
  const Type type = type_of(x_);
  const Tensor x = dense(x_), weight = dense(weight_), bias = dense(bias_), y = like(x);
  const Tensor mean = like(x, {s.B, groups}, ScalarType::Float), rstd = like(x, {s.B, groups}, ScalarType::Float);
  const int64_t chunks = chunks_of(s), width = s.C / groups;
  std::vector<double> part(s.B * chunks * 2 * groups);        // of each chunk: means, then sums of squared deviations
  for_samples(s, samples_at_once(s, x.element_size()), [&](int64_t first, int64_t last) {
    const auto no_constants = [](int64_t, float*) {};
    for_chunks(s, first, last, no_constants, [&](int64_t sample, int64_t chunk, int64_t i, int64_t n, const float*, float* scratch) {
      double* p = part.data() + (sample * chunks + chunk) * 2 * groups;
      cpu().group_norm_moments(s, type, at(x, i), n, scratch, p, p + groups);
    });
    for (int64_t i = first * groups; i < last * groups; ++i) {
      const double* p = part.data() + i / groups * chunks * 2 * groups + i % groups;
      const auto count = [&](int64_t chunk) { return double(std::min(s.chunk, s.n - chunk * s.chunk) / s.C * width); };
      double m = 0, square = 0;
      for (int64_t k = 0; k < chunks; ++k) m += p[k * 2 * groups] * count(k);
      m /= double(s.n / groups);
      for (int64_t k = 0; k < chunks; ++k) {
        const double d = p[k * 2 * groups] - m;
        square += p[(2 * k + 1) * groups] + d * d * count(k);
      }
      floats(mean)[i] = float(m);
      floats(rstd)[i] = float(1 / std::sqrt(square / double(s.n / groups) + eps));
    }
    for_chunks(s, first, last,
               [&](int64_t sample, float* constants) {
                 const int64_t g = sample * groups;
                 forward_constants(s, floats(mean) + g, floats(rstd) + g, floats(weight), floats(bias), constants);
               },
               [&](int64_t, int64_t, int64_t i, int64_t n, const float* constants, float*) {
                 cpu().group_norm_forward(s, type, at(x, i), n, constants, at_mutable(y, i));
               });
  });
  return {y, mean, rstd};
}

// With xhat = (x - mean) rstd, u = weight xhat + bias, du = dy silu'(u), and means over a group:
//   dbias = sum du, dweight = sum du xhat,  dx = rstd (weight du - mean(weight du) - xhat mean(weight du xhat))
std::tuple<Tensor, Tensor, Tensor> group_norm_silu_backward_cpu(const Tensor& dy_, const Tensor& x_, const Tensor& weight_,
                                                                const Tensor& bias_, const Tensor& mean_, const Tensor& rstd_,
                                                                int64_t groups) {
  const NormShape s = norm_shape(x_, weight_, bias_, groups);
  const Type type = type_of(x_);
  check_norm_backward(s, dy_, x_, mean_, rstd_);
  const Tensor dy = dense(dy_), x = dense(x_), weight = dense(weight_), bias = dense(bias_);
  const Tensor mean = dense(mean_), rstd = dense(rstd_);
  const Tensor dx = like(x), dweight = like(weight), dbias = like(weight);
  const int64_t chunks = chunks_of(s), width = s.C / groups;
  std::vector<float> part(s.B * chunks * 2 * s.C);            // of each chunk: sum du, then sum du (x - mean)
  std::vector<double> sums(s.B * 2 * s.C), total(2 * s.C);    // of each sample, and of all: sum du, sum du xhat
  const auto prepare = [&](int64_t sample, float* constants) {
    forward_constants(s, floats(mean) + sample * groups, floats(rstd) + sample * groups, floats(weight), floats(bias), constants);
  };
  const int64_t count = samples_at_once(s, 2 * x.element_size() + sizeof(float));
  const Aligned memory(type == Type::f32 ? 0 : std::min(s.B, count) * s.n);
  for_samples(s, count, [&](int64_t first, int64_t last) {
    // In fp32, whatever the dtype: dx is a difference of large terms. A dx in fp32 holds du meanwhile.
    float* const du = type == Type::f32 ? floats(dx) + first * s.n : memory.p;
    for_chunks(s, first, last, prepare, [&](int64_t sample, int64_t chunk, int64_t i, int64_t n, const float* constants,
                                            float* scratch) {
      cpu().group_norm_sums(s, type, at(dy, i), at(x, i), n, constants, scratch, du + i - first * s.n,
                            part.data() + (sample * chunks + chunk) * 2 * s.C);
    });
    for (int64_t sample = first; sample < last; ++sample) {
      double* sum = sums.data() + sample * 2 * s.C;
      for (int64_t k = 0; k < chunks; ++k)
        for (int64_t j = 0; j < 2 * s.C; ++j) sum[j] += part[(sample * chunks + k) * 2 * s.C + j];
      for (int64_t g = 0; g < groups; ++g)
        for (int64_t c = g * width; c < (g + 1) * width; ++c) sum[s.C + c] *= floats(rstd)[sample * groups + g];
      for (int64_t j = 0; j < 2 * s.C; ++j) total[j] += sum[j];
    }
    for_chunks(s, first, last,
               [&](int64_t sample, float* constants) {
                 prepare(sample, constants);
                 const double* sum = sums.data() + sample * 2 * s.C;
                 std::vector<double> du(groups), du_xhat(groups);               // their means over the group, times weight
                 for (int64_t g = 0; g < groups; ++g) {
                   for (int64_t c = g * width; c < (g + 1) * width; ++c) {
                     du[g] += floats(weight)[c] * sum[c];
                     du_xhat[g] += floats(weight)[c] * sum[s.C + c];
                   }
                   const double r = floats(rstd)[sample * groups + g], scale = r / double(s.n / groups);
                   du[g] *= scale, du_xhat[g] *= r * scale;
                 }
                 fill_constants(s, constants + 3 * s.columns, [&](int64_t, int64_t g) { return float(du[g]); });
                 fill_constants(s, constants + 4 * s.columns, [&](int64_t, int64_t g) { return float(du_xhat[g]); });
               },
               [&](int64_t, int64_t, int64_t i, int64_t n, const float* constants, float*) {
                 cpu().group_norm_backward(s, type, du + i - first * s.n, at(x, i), n, constants, at_mutable(dx, i));
               });
  });
  for (int64_t c = 0; c < s.C; ++c) floats(dbias)[c] = float(total[c]), floats(dweight)[c] = float(total[s.C + c]);
  return {dx, dweight, dbias};
}

#ifdef SAE_CUDA
cuda::GroupNorm norm_args(const NormShape& s, const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& mean,
                          const Tensor& rstd) {
  check(s.C <= 8192, "sae: group norm takes up to 8192 channels");
  cuda::GroupNorm a{};
  a.type = type_of(x);
  a.B = s.B, a.rows = s.n / s.C, a.C = int(s.C), a.groups = int(s.groups);
  a.x = x.data_ptr(), a.weight = floats(weight), a.bias = floats(bias), a.mean = floats(mean), a.rstd = floats(rstd);
  return a;
}
std::tuple<Tensor, Tensor, Tensor> group_norm_silu_cuda(const Tensor& x_, const Tensor& weight_, const Tensor& bias_, int64_t groups,
                                                        double eps) {
  const NormShape s = norm_shape(x_, weight_, bias_, groups);
  const Tensor x = dense(x_), weight = dense(weight_), bias = dense(bias_), y = like(x);
  const Tensor mean = like(x, {s.B, groups}, ScalarType::Float), rstd = like(x, {s.B, groups}, ScalarType::Float);
  cuda::GroupNorm a = norm_args(s, x, weight, bias, mean, rstd);
  const Tensor partial = like(x, {cuda::norm_partials(a)}, ScalarType::Float);
  a.eps = eps, a.y = y.data_ptr(), a.partial = floats(partial);
  launch(cuda::group_norm_silu_forward, a, x);
  return {y, mean, rstd};
}
std::tuple<Tensor, Tensor, Tensor> group_norm_silu_backward_cuda(const Tensor& dy_, const Tensor& x_, const Tensor& weight_,
                                                                 const Tensor& bias_, const Tensor& mean_, const Tensor& rstd_,
                                                                 int64_t groups) {
  const NormShape s = norm_shape(x_, weight_, bias_, groups);
  check_norm_backward(s, dy_, x_, mean_, rstd_);
  const Tensor dy = dense(dy_), x = dense(x_), weight = dense(weight_), bias = dense(bias_);
  const Tensor mean = dense(mean_), rstd = dense(rstd_);
  const Tensor dx = like(x), dweight = like(weight), dbias = like(weight);
  cuda::GroupNorm a = norm_args(s, x, weight, bias, mean, rstd);
  const Tensor partial = like(x, {cuda::norm_partials(a)}, ScalarType::Float);
  const Tensor sums = like(x, {s.B * 2 * s.C}, ScalarType::Double), slope = like(x, {s.B * 2 * groups}, ScalarType::Float);
  a.dy = dy.data_ptr(), a.dx = dx.data_ptr(), a.dweight = floats(dweight), a.dbias = floats(dbias);
  a.partial = floats(partial), a.sums = static_cast<double*>(sums.data_ptr()), a.slope = floats(slope);
  launch(cuda::group_norm_silu_backward, a, x);
  return {dx, dweight, dbias};
}
#endif

int64_t source_crc() { return kSourceCrc; }
bool has_cuda() {
#ifdef SAE_CUDA
  return true;
#else
  return false;
#endif
}
std::string cpu_kernels() { return cpu().name; }

}  // namespace
}  // namespace sae

STABLE_TORCH_LIBRARY(sae, m) {
  m.def("attention(Tensor qkv, Tensor rows, Tensor cols, int prefix) -> (Tensor out, Tensor lse)");
  m.def("attention_backward(Tensor dout, Tensor qkv, Tensor rows, Tensor cols, Tensor out, Tensor lse, int prefix) -> Tensor dqkv");
  m.def("reparameterize(Tensor mu, Tensor logvar, SymInt seed, SymInt offset) -> (Tensor z, Tensor kl)");
  m.def("reparameterize_backward(Tensor dz, Tensor dkl, Tensor mu, Tensor logvar, SymInt seed, SymInt offset) -> (Tensor dmu, Tensor dlogvar)");
  m.def("feature_mse(Tensor student, Tensor teacher) -> Tensor loss");
  m.def("feature_mse_backward(Tensor dloss, Tensor student, Tensor teacher) -> Tensor dstudent");
  m.def("group_norm_silu(Tensor x, Tensor weight, Tensor bias, int groups, float eps) -> (Tensor y, Tensor mean, Tensor rstd)");
  m.def("group_norm_silu_backward(Tensor dy, Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor rstd, int groups) "
        "-> (Tensor dx, Tensor dweight, Tensor dbias)");
  m.def("source_crc() -> int");
  m.def("has_cuda() -> bool");
  m.def("cpu_kernels() -> str");
}
STABLE_TORCH_LIBRARY_IMPL(sae, CompositeExplicitAutograd, m) {
  m.impl("source_crc", TORCH_BOX(&sae::source_crc));
  m.impl("has_cuda", TORCH_BOX(&sae::has_cuda));
  m.impl("cpu_kernels", TORCH_BOX(&sae::cpu_kernels));
}
STABLE_TORCH_LIBRARY_IMPL(sae, CPU, m) {
  m.impl("attention", TORCH_BOX(&sae::attention_cpu));
  m.impl("attention_backward", TORCH_BOX(&sae::attention_backward_cpu));
  m.impl("reparameterize", TORCH_BOX(&sae::reparameterize_cpu));
  m.impl("reparameterize_backward", TORCH_BOX(&sae::reparameterize_backward_cpu));
  m.impl("feature_mse", TORCH_BOX(&sae::feature_mse_cpu));
  m.impl("feature_mse_backward", TORCH_BOX(&sae::feature_mse_backward_cpu));
  m.impl("group_norm_silu", TORCH_BOX(&sae::group_norm_silu_cpu));
  m.impl("group_norm_silu_backward", TORCH_BOX(&sae::group_norm_silu_backward_cpu));
}
#ifdef SAE_CUDA
STABLE_TORCH_LIBRARY_IMPL(sae, CUDA, m) {
  m.impl("attention", TORCH_BOX(&sae::attention_cuda));
  m.impl("attention_backward", TORCH_BOX(&sae::attention_backward_cuda));
  m.impl("reparameterize", TORCH_BOX(&sae::reparameterize_cuda));
  m.impl("reparameterize_backward", TORCH_BOX(&sae::reparameterize_backward_cuda));
  m.impl("feature_mse", TORCH_BOX(&sae::feature_mse_cuda));
  m.impl("feature_mse_backward", TORCH_BOX(&sae::feature_mse_backward_cuda));
  m.impl("group_norm_silu", TORCH_BOX(&sae::group_norm_silu_cuda));
  m.impl("group_norm_silu_backward", TORCH_BOX(&sae::group_norm_silu_backward_cuda));
}
#endif
