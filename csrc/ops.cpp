// torch.ops.sae, what PyTorch calls: each op checks its tensors, allocates its outputs, and runs the kernel
// of their device.
//
// Uses libtorch's stable ABI only, so one binary serves every torch from 2.11 on. Autograd and the shape
// functions for torch.compile are registered in sae.py. A reader of the kernels starts at attention_fp32.cu.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "kernels.h"

namespace sae {
extern const int64_t kSourceCrc;                              // of csrc, written by setup.py

namespace {
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// ------------------------------------------------------------------ tensors

void check(bool ok, const char* message) {
  if (!ok) throw std::runtime_error(message);
}

Type type_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Type::f32;
    case ScalarType::BFloat16: return Type::bf16;
    case ScalarType::Half: return Type::f16;
    default: throw std::runtime_error("sae: tensors must be float32, bfloat16 or float16");
  }
}

bool same_place(const Tensor& a, const Tensor& b) {
  return a.is_cuda() == b.is_cuda() && a.get_device_index() == b.get_device_index();
}
// float32 on the device of `other`, as parameters and statistics must be
bool is_float_beside(const Tensor& t, const Tensor& other) {
  return t.scalar_type() == ScalarType::Float && same_place(t, other);
}

void check_alike(const Tensor& a, const Tensor& b) {
  bool same = a.dim() == b.dim() && a.scalar_type() == b.scalar_type() && same_place(a, b);
  for (int64_t i = 0; same && i < a.dim(); ++i) same = a.size(i) == b.size(i);
  check(same, "sae: tensors must agree in shape, dtype and device");
}

// Contiguous, and aligned for loads of 16 bytes: a view may start anywhere in its storage.
Tensor dense(const Tensor& t) {
  const Tensor c = torch::stable::contiguous(t);
  const bool aligned = reinterpret_cast<uintptr_t>(c.data_ptr()) % 16 == 0;
  return aligned ? c : torch::stable::clone(c);
}

Tensor allocate(const Tensor& beside, std::vector<int64_t> size, ScalarType type) {
  return torch::stable::new_empty(beside, size, type);
}
Tensor like(const Tensor& t) {                                // contiguous, which empty_like need not be
  return torch::stable::new_empty(t, {t.sizes().begin(), t.sizes().end()});
}

float* floats(const Tensor& t) { return static_cast<float*>(t.data_ptr()); }
double* doubles(const Tensor& t) { return static_cast<double*>(t.data_ptr()); }

// ------------------------------------------------------------------ the device

// SAE_RUN(kernel, args, t) calls cpu::kernel or cuda::kernel, as the device of tensor t asks for.
#ifdef SAE_CUDA
template <class Args>
void launch(const char* (*kernel)(const Args&, void*), const Args& args, const Tensor& t) {
  const torch::stable::accelerator::DeviceGuard guard(t.get_device_index());
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  if (const char* error = kernel(args, stream)) throw std::runtime_error(std::string("sae: ") + error);
}
#define SAE_RUN(kernel, args, t) (t.is_cuda() ? launch(cuda::kernel, args, t) : cpu::kernel(args))
#else
#define SAE_RUN(kernel, args, t) cpu::kernel(args)
#endif

// ------------------------------------------------------------------ attention

// What both directions take, checked. The tensors must be dense.
Attention attention_arguments(const Tensor& qkv, const Tensor& rows, const Tensor& cols, int64_t prefix) {
  check(qkv.dim() == 5 && qkv.size(2) == 3 && qkv.size(4) == kHeadDim, "sae: qkv must be [B,N,3,H,64]");
  for (const Tensor* t : {&rows, &cols})
    check(t->dim() == 3 && t->size(1) == 16 && t->size(2) == 2 && is_float_beside(*t, qkv),
          "sae: rope tables must be float32 [h,16,2] and [w,16,2] on the device of qkv");

  const int64_t N = qkv.size(1), H = qkv.size(3), h = rows.size(0), w = cols.size(0);
  check(prefix >= 0 && N == prefix + h * w && N > 0, "sae: N must be prefix + h w, at least 1");
  check(N < (1 << 24) && H < (1 << 20), "sae: attention takes less than 2^24 tokens and 2^20 heads");

  Attention a{};
  a.type = type_of(qkv);
  a.B = qkv.size(0);
  a.N = int(N), a.H = int(H), a.prefix = int(prefix), a.h = int(h), a.w = int(w);
  a.rows = floats(rows), a.cols = floats(cols);
  a.qkv = qkv.data_ptr();
  return a;
}

std::tuple<Tensor, Tensor> attention(const Tensor& qkv_, const Tensor& rows_, const Tensor& cols_,
                                     int64_t prefix) {
  const Tensor qkv = dense(qkv_), rows = dense(rows_), cols = dense(cols_);
  Attention a = attention_arguments(qkv, rows, cols, prefix);

  const Tensor out = allocate(qkv, {a.B, a.N, a.H * kHeadDim}, qkv.scalar_type());
  const Tensor lse = allocate(qkv, {a.B, a.H, a.N}, ScalarType::Float);
  a.out = out.data_ptr(), a.lse = floats(lse);

  SAE_RUN(attention_forward, a, qkv);
  return {out, lse};
}

Tensor attention_backward(const Tensor& dout_, const Tensor& qkv_, const Tensor& rows_, const Tensor& cols_,
                          const Tensor& out_, const Tensor& lse_, int64_t prefix) {
  const Tensor qkv = dense(qkv_), rows = dense(rows_), cols = dense(cols_);
  const Tensor dout = dense(dout_), out = dense(out_), lse = dense(lse_);
  Attention a = attention_arguments(qkv, rows, cols, prefix);
  check_alike(dout, out);
  check(out.numel() * 3 == qkv.numel() && out.scalar_type() == qkv.scalar_type() && same_place(out, qkv) &&
            lse.numel() == a.B * a.H * a.N && is_float_beside(lse, qkv),
        "sae: dout, out and lse must be those of this qkv");

  const Tensor dqkv = like(qkv), delta = like(lse);
  a.dout = dout.data_ptr(), a.out = out.data_ptr(), a.lse = floats(lse);
  a.dqkv = dqkv.data_ptr(), a.delta = floats(delta);

  SAE_RUN(attention_backward, a, qkv);
  return dqkv;
}

// ------------------------------------------------------------------ the Gaussian bottleneck

Gaussian gaussian_arguments(const Tensor& mu, const Tensor& logvar, int64_t seed, int64_t offset) {
  check_alike(mu, logvar);
  check(mu.dim() >= 2, "sae: mu must be [B,...]");

  Gaussian a{};
  a.type = type_of(mu);
  a.B = mu.size(0), a.n = a.B ? mu.numel() / a.B : 0;
  a.seed = seed, a.offset = offset;
  a.mu = mu.data_ptr(), a.logvar = logvar.data_ptr();
  return a;
}

std::tuple<Tensor, Tensor> reparameterize(const Tensor& mu_, const Tensor& logvar_, int64_t seed,
                                          int64_t offset) {
  const Tensor mu = dense(mu_), logvar = dense(logvar_);
  Gaussian a = gaussian_arguments(mu, logvar, seed, offset);

  const Tensor z = like(mu), kl = allocate(mu, {a.B}, ScalarType::Float);
  const Tensor partial = allocate(mu, {a.B, partials(a.n)}, ScalarType::Double);
  a.z = z.data_ptr(), a.kl = floats(kl), a.partial = doubles(partial);

  SAE_RUN(reparameterize_forward, a, mu);
  return {z, kl};
}

std::tuple<Tensor, Tensor> reparameterize_backward(const Tensor& dz_, const Tensor& dkl_, const Tensor& mu_,
                                                   const Tensor& logvar_, int64_t seed, int64_t offset) {
  const Tensor dz = dense(dz_), dkl = dense(dkl_), mu = dense(mu_), logvar = dense(logvar_);
  Gaussian a = gaussian_arguments(mu, logvar, seed, offset);
  check_alike(dz, mu);
  check(dkl.numel() == a.B && is_float_beside(dkl, mu), "sae: dkl must be float32 [B]");

  const Tensor dmu = like(mu), dlogvar = like(mu);
  a.dz = dz.data_ptr(), a.dkl = floats(dkl);
  a.dmu = dmu.data_ptr(), a.dlogvar = dlogvar.data_ptr();

  SAE_RUN(reparameterize_backward, a, mu);
  return {dmu, dlogvar};
}

// ------------------------------------------------------------------ feature MSE

SquaredError squared_error_arguments(const Tensor& student, const Tensor& teacher) {
  check_alike(student, teacher);

  SquaredError e{};
  e.type = type_of(student);
  e.n = student.numel();
  e.a = student.data_ptr(), e.b = teacher.data_ptr();
  return e;
}

Tensor feature_mse(const Tensor& student_, const Tensor& teacher_) {
  const Tensor student = dense(student_), teacher = dense(teacher_);
  SquaredError e = squared_error_arguments(student, teacher);

  const Tensor loss = allocate(student, {}, ScalarType::Float);
  const Tensor partial = allocate(student, {partials(e.n)}, ScalarType::Double);
  e.mean = floats(loss), e.partial = doubles(partial);

  SAE_RUN(squared_error_forward, e, student);
  return loss;
}

Tensor feature_mse_backward(const Tensor& dloss_, const Tensor& student_, const Tensor& teacher_) {
  const Tensor dloss = dense(dloss_), student = dense(student_), teacher = dense(teacher_);
  SquaredError e = squared_error_arguments(student, teacher);
  check(dloss.numel() == 1 && is_float_beside(dloss, student),
        "sae: the gradient of the loss must be one float32");

  const Tensor dstudent = like(student);
  e.dmean = floats(dloss), e.da = dstudent.data_ptr();

  SAE_RUN(squared_error_backward, e, student);
  return dstudent;
}

// ------------------------------------------------------------------ SiLU of group norm

// x: [B,...,C], channels last; weight, bias: float32 [C]
GroupNorm norm_arguments(const Tensor& x, const Tensor& weight, const Tensor& bias, int64_t groups) {
  check(x.dim() >= 2 && x.size(-1) > 0, "sae: x must be [B,...,C] with C > 0");
  const int64_t C = x.size(-1);
  check(groups > 0 && C % groups == 0, "sae: C must be a multiple of groups");
  // Backward on a GPU takes 16 bytes of shared memory for each channel of a group: 129 KB where all 8192 are
  // one group, which sm_80 and sm_90 have.
  check(C <= (x.is_cuda() ? 8192 : 1 << 30), "sae: group norm takes up to 8192 channels");
  for (const Tensor* t : {&weight, &bias})
    check(t->dim() == 1 && t->size(0) == C && is_float_beside(*t, x),
          "sae: weight and bias must be float32 [C] on the device of x");

  GroupNorm a{};
  a.type = type_of(x);
  a.B = x.size(0), a.rows = a.B ? x.numel() / a.B / C : 0;
  a.C = int(C), a.groups = int(groups);
  a.x = x.data_ptr(), a.weight = floats(weight), a.bias = floats(bias);
  return a;
}

Tensor norm_partial(const GroupNorm& a, const Tensor& x) {
  int64_t n = 0;                                              // the CPU has its own
#ifdef SAE_CUDA
  if (x.is_cuda()) n = cuda::norm_partials(a);
#endif
  return allocate(x, {n}, ScalarType::Float);
}

std::tuple<Tensor, Tensor, Tensor> group_norm_silu(const Tensor& x_, const Tensor& weight_,
                                                   const Tensor& bias_, int64_t groups, double eps) {
  const Tensor x = dense(x_), weight = dense(weight_), bias = dense(bias_);
  GroupNorm a = norm_arguments(x, weight, bias, groups);

  const Tensor y = like(x), partial = norm_partial(a, x);
  const Tensor mean = allocate(x, {a.B, groups}, ScalarType::Float), rstd = like(mean);
  a.eps = eps;
  a.y = y.data_ptr(), a.mean = floats(mean), a.rstd = floats(rstd), a.partial = floats(partial);

  SAE_RUN(group_norm_silu_forward, a, x);
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> group_norm_silu_backward(const Tensor& dy_, const Tensor& x_,
                                                            const Tensor& weight_, const Tensor& bias_,
                                                            const Tensor& mean_, const Tensor& rstd_,
                                                            int64_t groups) {
  const Tensor dy = dense(dy_), x = dense(x_), weight = dense(weight_), bias = dense(bias_);
  const Tensor mean = dense(mean_), rstd = dense(rstd_);
  GroupNorm a = norm_arguments(x, weight, bias, groups);
  check_alike(dy, x);
  for (const Tensor* t : {&mean, &rstd})
    check(t->numel() == a.B * groups && is_float_beside(*t, x),
          "sae: mean and rstd must be those of this x");

  const Tensor dx = like(x), dweight = like(weight), dbias = like(bias);
  const Tensor partial = norm_partial(a, x), slope = allocate(x, {a.B, 2, groups}, ScalarType::Float);
  const Tensor sums = allocate(x, {a.B, 2, a.C}, ScalarType::Double);
  a.dy = dy.data_ptr(), a.mean = floats(mean), a.rstd = floats(rstd);
  a.dx = dx.data_ptr(), a.dweight = floats(dweight), a.dbias = floats(dbias);
  a.partial = floats(partial), a.sums = doubles(sums), a.slope = floats(slope);

  SAE_RUN(group_norm_silu_backward, a, x);
  return {dx, dweight, dbias};
}

// ------------------------------------------------------------------ about this binary

int64_t source_crc() { return kSourceCrc; }

bool has_cuda() {
#ifdef SAE_CUDA
  return true;
#else
  return false;
#endif
}

std::string cpu_kernels() { return cpu::instruction_set(); }

template <class Library>
void register_kernels(Library& m) {
  m.impl("attention", TORCH_BOX(&attention));
  m.impl("attention_backward", TORCH_BOX(&attention_backward));
  m.impl("reparameterize", TORCH_BOX(&reparameterize));
  m.impl("reparameterize_backward", TORCH_BOX(&reparameterize_backward));
  m.impl("feature_mse", TORCH_BOX(&feature_mse));
  m.impl("feature_mse_backward", TORCH_BOX(&feature_mse_backward));
  m.impl("group_norm_silu", TORCH_BOX(&group_norm_silu));
  m.impl("group_norm_silu_backward", TORCH_BOX(&group_norm_silu_backward));
}

}  // namespace
}  // namespace sae

STABLE_TORCH_LIBRARY(sae, m) {
  m.def("attention(Tensor qkv, Tensor rows, Tensor cols, int prefix) -> (Tensor out, Tensor lse)");
  m.def("attention_backward(Tensor dout, Tensor qkv, Tensor rows, Tensor cols, Tensor out, Tensor lse, "
        "int prefix) -> Tensor dqkv");
  m.def("reparameterize(Tensor mu, Tensor logvar, SymInt seed, SymInt offset) -> (Tensor z, Tensor kl)");
  m.def("reparameterize_backward(Tensor dz, Tensor dkl, Tensor mu, Tensor logvar, SymInt seed, "
        "SymInt offset) -> (Tensor dmu, Tensor dlogvar)");
  m.def("feature_mse(Tensor student, Tensor teacher) -> Tensor loss");
  m.def("feature_mse_backward(Tensor dloss, Tensor student, Tensor teacher) -> Tensor dstudent");
  m.def("group_norm_silu(Tensor x, Tensor weight, Tensor bias, int groups, float eps) "
        "-> (Tensor y, Tensor mean, Tensor rstd)");
  m.def("group_norm_silu_backward(Tensor dy, Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor rstd, "
        "int groups) -> (Tensor dx, Tensor dweight, Tensor dbias)");
  m.def("source_crc() -> int");
  m.def("has_cuda() -> bool");
  m.def("cpu_kernels() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(sae, CompositeExplicitAutograd, m) {
  m.impl("source_crc", TORCH_BOX(&sae::source_crc));
  m.impl("has_cuda", TORCH_BOX(&sae::has_cuda));
  m.impl("cpu_kernels", TORCH_BOX(&sae::cpu_kernels));
}

STABLE_TORCH_LIBRARY_IMPL(sae, CPU, m) { sae::register_kernels(m); }
#ifdef SAE_CUDA
STABLE_TORCH_LIBRARY_IMPL(sae, CUDA, m) { sae::register_kernels(m); }
#endif
