// The CUDA kernels as simt.h runs them on the CPU: a Python module for the tests. Tensors come as addresses.
// Apart from the kernels, so that it is compiled once and linked with many versions of them.
#include <pybind11/pybind11.h>

#include <stdexcept>

#include "../../csrc/kernels.h"

namespace {
using Address = uintptr_t;
template <class T = void>
T* at(Address a) { return reinterpret_cast<T*>(a); }
sae::Type type(int i) { return static_cast<sae::Type>(i); }   // 0 float32, 1 bfloat16, 2 float16
void check(const char* error) {
  if (error) throw std::runtime_error(error);
}
}  // namespace

using namespace sae;
using namespace sae::cuda;

PYBIND11_MODULE(emulate, m) {
  m.def("attention_forward", [](int t, int64_t B, int N, int H, int prefix, int h, int w, Address rows,
                                Address cols, Address qkv, Address out, Address lse) {
    Attention a{};
    a.type = type(t), a.B = B, a.N = N, a.H = H, a.prefix = prefix, a.h = h, a.w = w;
    a.rows = at<float>(rows), a.cols = at<float>(cols), a.qkv = at(qkv), a.out = at(out);
    a.lse = at<float>(lse);
    check(attention_forward(a, nullptr));
  });
  m.def("attention_backward",
        [](int t, int64_t B, int N, int H, int prefix, int h, int w, Address rows, Address cols, Address qkv,
           Address out, Address lse, Address dout, Address delta, Address dqkv) {
          Attention a{};
          a.type = type(t), a.B = B, a.N = N, a.H = H, a.prefix = prefix, a.h = h, a.w = w;
          a.rows = at<float>(rows), a.cols = at<float>(cols), a.qkv = at(qkv), a.out = at(out);
          a.lse = at<float>(lse);
          a.dout = at(dout), a.delta = at<float>(delta), a.dqkv = at(dqkv);
          check(attention_backward(a, nullptr));
        });
  m.def("reparameterize_forward", [](int t, int64_t B, int64_t n, uint64_t seed, uint64_t offset, Address mu,
                                     Address logvar, Address z, Address kl, Address partial) {
    Gaussian a{};
    a.type = type(t), a.B = B, a.n = n, a.seed = seed, a.offset = offset;
    a.mu = at(mu), a.logvar = at(logvar), a.z = at(z), a.kl = at<float>(kl), a.partial = at<double>(partial);
    check(reparameterize_forward(a, nullptr));
  });
  m.def("reparameterize_backward", [](int t, int64_t B, int64_t n, uint64_t seed, uint64_t offset, Address mu,
                                      Address logvar, Address dz, Address dkl, Address dmu, Address dlogvar) {
    Gaussian a{};
    a.type = type(t), a.B = B, a.n = n, a.seed = seed, a.offset = offset;
    a.mu = at(mu), a.logvar = at(logvar), a.dz = at(dz), a.dkl = at<float>(dkl), a.dmu = at(dmu);
    a.dlogvar = at(dlogvar);
    check(reparameterize_backward(a, nullptr));
  });
  m.def("squared_error_forward", [](int t, int64_t n, Address a, Address b, Address mean, Address partial) {
    SquaredError e{};
    e.type = type(t), e.n = n, e.a = at(a), e.b = at(b), e.mean = at<float>(mean);
    e.partial = at<double>(partial);
    check(squared_error_forward(e, nullptr));
  });
  m.def("squared_error_backward", [](int t, int64_t n, Address a, Address b, Address dmean, Address da) {
    SquaredError e{};
    e.type = type(t), e.n = n, e.a = at(a), e.b = at(b), e.dmean = at<float>(dmean), e.da = at(da);
    check(squared_error_backward(e, nullptr));
  });
  m.def("partials", &partials);
  m.def("norm_partials", [](int64_t B, int64_t rows, int C) {
    GroupNorm a{};
    a.B = B, a.rows = rows, a.C = C;
    return norm_partials(a);
  });
  m.def("group_norm_silu_forward",
        [](int t, int64_t B, int64_t rows, int C, int groups, double eps, Address x, Address weight,
           Address bias, Address mean, Address rstd, Address y, Address partial) {
          GroupNorm a{};
          a.type = type(t), a.B = B, a.rows = rows, a.C = C, a.groups = groups, a.eps = eps;
          a.x = at(x), a.weight = at<float>(weight), a.bias = at<float>(bias), a.mean = at<float>(mean);
          a.rstd = at<float>(rstd);
          a.y = at(y), a.partial = at<float>(partial);
          check(group_norm_silu_forward(a, nullptr));
        });
  m.def("group_norm_silu_backward",
        [](int t, int64_t B, int64_t rows, int C, int groups, Address x, Address weight, Address bias,
           Address mean, Address rstd, Address dy, Address dx, Address dweight, Address dbias,
           Address partial, Address sums, Address slope) {
          GroupNorm a{};
          a.type = type(t), a.B = B, a.rows = rows, a.C = C, a.groups = groups;
          a.x = at(x), a.weight = at<float>(weight), a.bias = at<float>(bias), a.mean = at<float>(mean);
          a.rstd = at<float>(rstd);
          a.dy = at(dy), a.dx = at(dx), a.dweight = at<float>(dweight), a.dbias = at<float>(dbias);
          a.partial = at<float>(partial), a.sums = at<double>(sums), a.slope = at<float>(slope);
          check(group_norm_silu_backward(a, nullptr));
        });
}
