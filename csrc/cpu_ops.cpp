// The CPU side of every op: it chooses the kernels that fit the processor, cuts an op into tasks, shares them
// among threads and adds up what they return. The order of every sum is a function of the shape alone, so the
// thread count changes no bit.
//
// Everything here is compiled without any processor's extensions; the kernels themselves are in
// cpu_attention.h, cpu_gaussian.h and cpu_norm.h.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include "cpu_kernels.h"

namespace sae {
namespace cpu {
namespace {

// ------------------------------------------------------------------ the processor, threads, memory

const CpuKernels& choose_kernels() {
#if defined(__x86_64__)
  const char* wanted = std::getenv("SAE_CPU");  // avx512, avx2 or generic: for tests on a better processor
  const std::string limit = wanted ? wanted : "avx512bf16";
  __builtin_cpu_init();
  const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx512 && __builtin_cpu_supports("avx512bf16") && limit == "avx512bf16") return kCpuAvx512Bf16;
  if (avx512 && limit != "avx2" && limit != "generic") return kCpuAvx512;
  if (avx2 && limit != "generic") return kCpuAvx2;
#endif
  return kCpuGeneric;
}
const CpuKernels& kernels() {
  static const CpuKernels& best = choose_kernels();
  return best;
}

// body(begin, end) for tasks begin .. end - 1, on all threads
template <class Body>
void parallel(int64_t tasks, Body body) {
  torch::stable::parallel_for(0, tasks, 1, body);
}

struct Aligned {                                              // n floats, aligned to 64 bytes
  std::unique_ptr<float[]> memory;
  float* p;
  explicit Aligned(size_t n) : memory(new float[n + 16]) {
    p = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory.get()) + 63) / 64 * 64);
  }
};

// body(chunk, sample, first, count) for the chunks of B samples of n elements.
template <class Body>
void for_chunks(int64_t B, int64_t n, Body body) {
  const int64_t chunks = partials(n);
  parallel(B * chunks, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % chunks * kChunk;
      body(i, i / chunks, first, std::min(kChunk, n - first));
    }
  });
}

// ------------------------------------------------------------------ attention

// The angles of the patches: [h w, 2, 32], the cosines, then the sines.
// Pairs 0-15 turn by the row, 16-31 by the column.
std::vector<float> angles_of_patches(const Attention& a) {
  std::vector<float> angles(int64_t(a.h) * a.w * 64);
  float* out = angles.data();
  for (int y = 0; y < a.h; ++y)
    for (int x = 0; x < a.w; ++x)
      for (int which = 0; which < 2; ++which) {
        for (int i = 0; i < 16; ++i) *out++ = a.rows[(y * 16 + i) * 2 + which];
        for (int i = 0; i < 16; ++i) *out++ = a.cols[(x * 16 + i) * 2 + which];
      }
  return angles;
}

void attention(const Attention& a, bool backward) {
  const std::vector<float> angles = angles_of_patches(a);
  const auto kernel = backward ? kernels().attention_backward : kernels().attention_forward;
  parallel(a.B * a.H, [&](int64_t begin, int64_t end) {
    const Aligned scratch(kernels().attention_scratch(a, backward));
    for (int64_t task = begin; task < end; ++task) kernel(a, task, angles.data(), scratch.p);
  });
}

}  // namespace

const char* instruction_set() { return kernels().name; }

void attention_forward(const Attention& a) { attention(a, false); }
void attention_backward(const Attention& a) { attention(a, true); }

// ------------------------------------------------------------------ Gaussian, squared error

void reparameterize_forward(const Gaussian& a) {
  for_chunks(a.B, a.n, [&](int64_t chunk, int64_t sample, int64_t first, int64_t count) {
    a.partial[chunk] = kernels().reparameterize_forward(a, sample, first, count);
  });
  const int64_t chunks = partials(a.n);
  for (int64_t i = 0; i < a.B; ++i)
    a.kl[i] = float(std::accumulate(a.partial + i * chunks, a.partial + (i + 1) * chunks, 0.0));
}

void reparameterize_backward(const Gaussian& a) {
  for_chunks(a.B, a.n, [&](int64_t, int64_t sample, int64_t first, int64_t count) {
    kernels().reparameterize_backward(a, sample, first, count);
  });
}

void squared_error_forward(const SquaredError& e) {
  for_chunks(1, e.n, [&](int64_t chunk, int64_t, int64_t first, int64_t count) {
    e.partial[chunk] = kernels().squared_error_forward(e, first, count);
  });
  const double sum = std::accumulate(e.partial, e.partial + partials(e.n), 0.0);
  *e.mean = float(sum / double(e.n));
}

void squared_error_backward(const SquaredError& e) {
  for_chunks(1, e.n, [&](int64_t, int64_t, int64_t first, int64_t count) {
    kernels().squared_error_backward(e, first, count);
  });
}

// ------------------------------------------------------------------ SiLU of group norm

namespace {

// Of a chunk, in elements: the second pass over it finds it in the L2 cache.
constexpr int64_t kNormChunk = 1 << 15;
// In bytes: the samples that a pass leaves in the last cache for the next one.
constexpr int64_t kNormCache = 8 << 20;

NormCut cut_of(const GroupNorm& a) {
  NormCut cut;
  cut.n = a.rows * a.C;
  cut.columns = std::lcm(int64_t(a.C), int64_t(16));
  cut.chunk = std::max(int64_t(1), kNormChunk / cut.columns) * cut.columns;
  return cut;
}
int64_t chunks_of(const NormCut& cut) { return (cut.n + cut.chunk - 1) / cut.chunk; }

// Both directions read their inputs twice, so they take only as many samples at a time as the cache holds.
int64_t samples_at_once(const NormCut& cut, int64_t bytes_of_element) {
  return std::max(int64_t(1), kNormCache / std::max(int64_t(1), cut.n * bytes_of_element));
}
int64_t bytes(Type type) { return type == Type::f32 ? 4 : 2; }

struct NormChunk {
  int64_t sample, index;                                      // the chunk's number in its sample
  int64_t first, n;                                           // its first element in x, its elements
  float *constants, *scratch;                                 // [5, columns] of its sample, [3, columns]
};
// body(NormChunk) for the chunks of samples begin .. end - 1; prepare(sample, constants) comes before those
// of a sample.
template <class Prepare, class Body>
void for_norm_chunks(const NormCut& cut, int64_t begin, int64_t end, Prepare prepare, Body body) {
  const int64_t chunks = chunks_of(cut);
  parallel((end - begin) * chunks, [&](int64_t first_task, int64_t last_task) {
    const Aligned memory(8 * cut.columns);
    for (int64_t task = first_task; task < last_task; ++task) {
      const int64_t sample = begin + task / chunks, index = task % chunks, element = index * cut.chunk;
      if (task == first_task || index == 0) prepare(sample, memory.p);
      body(NormChunk{sample, index, sample * cut.n + element, std::min(cut.chunk, cut.n - element), memory.p,
                     memory.p + 5 * cut.columns});
    }
  });
}

// constants [columns] of a sample: value(c, g) for channel c of group g
template <class Value>
void fill_constants(const GroupNorm& a, const NormCut& cut, float* constants, Value value) {
  const int64_t width = a.C / a.groups;
  for (int64_t g = 0; g < a.groups; ++g)
    for (int64_t c = g * width; c < (g + 1) * width; ++c) constants[c] = value(c, g);
  for (int64_t c = a.C; c < cut.columns; ++c) constants[c] = constants[c - a.C];
}
// [3, columns]: mean, rstd weight, bias
void forward_constants(const GroupNorm& a, const NormCut& cut, int64_t sample, float* constants) {
  const float *mean = a.mean + sample * a.groups, *rstd = a.rstd + sample * a.groups;
  fill_constants(a, cut, constants, [&](int64_t, int64_t g) { return mean[g]; });
  fill_constants(a, cut, constants + cut.columns,
                 [&](int64_t c, int64_t g) { return rstd[g] * a.weight[c]; });
  fill_constants(a, cut, constants + 2 * cut.columns, [&](int64_t c, int64_t) { return a.bias[c]; });
}
// [5, columns]: those, then offset and slope
void backward_constants(const GroupNorm& a, const NormCut& cut, int64_t sample, float* constants) {
  const float *offset = a.slope + sample * 2 * a.groups, *slope = offset + a.groups;
  forward_constants(a, cut, sample, constants);
  fill_constants(a, cut, constants + 3 * cut.columns, [&](int64_t, int64_t g) { return offset[g]; });
  fill_constants(a, cut, constants + 4 * cut.columns, [&](int64_t, int64_t g) { return slope[g]; });
}

// Joins the moments of a sample's chunks by Chan's formula: with the count n_k, the mean m_k and the squared
// deviations q_k of chunk k,
//   mean = sum n_k m_k / n,  variance = sum (q_k + n_k (m_k - mean)^2) / n.
// parts: [chunks, 2, groups], the means, then the squared deviations.
void join_moments(const GroupNorm& a, const NormCut& cut, int64_t sample, const double* parts) {
  const int64_t chunks = chunks_of(cut), width = a.C / a.groups;
  const double n = double(cut.n / a.groups);
  const auto count = [&](int64_t k) {
    return double(std::min(cut.chunk, cut.n - k * cut.chunk) / a.C * width);
  };
  for (int64_t g = 0; g < a.groups; ++g) {
    double mean = 0, square = 0;
    for (int64_t k = 0; k < chunks; ++k) mean += parts[2 * k * a.groups + g] * count(k);
    mean /= n;
    for (int64_t k = 0; k < chunks; ++k) {
      const double d = parts[2 * k * a.groups + g] - mean;
      square += parts[(2 * k + 1) * a.groups + g] + d * d * count(k);
    }
    a.mean[sample * a.groups + g] = float(mean);
    a.rstd[sample * a.groups + g] = float(1 / std::sqrt(square / n + a.eps));
  }
}

// Adds up the sums of a sample's chunks, parts [chunks, 2, C] of du and du (x - mean), into a.sums: sum du
// and sum du xhat.
void join_sums(const GroupNorm& a, const NormCut& cut, int64_t sample, const float* parts) {
  const int64_t width = a.C / a.groups;
  double* sums = a.sums + sample * 2 * a.C;
  std::fill(sums, sums + 2 * a.C, 0.0);
  for (int64_t k = 0; k < chunks_of(cut); ++k)
    for (int64_t j = 0; j < 2 * a.C; ++j) sums[j] += parts[k * 2 * a.C + j];
  for (int64_t g = 0; g < a.groups; ++g)
    for (int64_t c = g * width; c < (g + 1) * width; ++c) sums[a.C + c] *= a.rstd[sample * a.groups + g];
}

// dx = rstd (weight du - mean(weight du) - xhat mean(weight du xhat)), the means over a group, is
//    = rstd weight du - (offset + slope (x - mean))
// with offset = rstd mean(weight du) and slope = rstd^2 mean(weight du xhat).
void group_slopes(const GroupNorm& a, const NormCut& cut, int64_t sample) {
  const int64_t width = a.C / a.groups;
  const double* sums = a.sums + sample * 2 * a.C;
  float *offset = a.slope + sample * 2 * a.groups, *slope = offset + a.groups;
  for (int64_t g = 0; g < a.groups; ++g) {
    double du = 0, du_xhat = 0;
    for (int64_t c = g * width; c < (g + 1) * width; ++c) {
      du += a.weight[c] * sums[c];
      du_xhat += a.weight[c] * sums[a.C + c];
    }
    const double rstd = a.rstd[sample * a.groups + g], scale = rstd / double(cut.n / a.groups);
    offset[g] = float(du * scale);
    slope[g] = float(du_xhat * (rstd * scale));
  }
}

}  // namespace

void group_norm_silu_forward(const GroupNorm& a) {
  const NormCut cut = cut_of(a);
  const int64_t chunks = chunks_of(cut), step = samples_at_once(cut, bytes(a.type));
  std::vector<double> parts(a.B * chunks * 2 * a.groups);
  for (int64_t begin = 0; begin < a.B; begin += step) {
    const int64_t end = std::min(a.B, begin + step);
    const auto no_constants = [](int64_t, float*) {};
    for_norm_chunks(cut, begin, end, no_constants, [&](const NormChunk& c) {
      double* mean = parts.data() + (c.sample * chunks + c.index) * 2 * a.groups;
      kernels().group_norm_moments(a, cut, c.first, c.n, c.scratch, mean, mean + a.groups);
    });
    for (int64_t i = begin; i < end; ++i) join_moments(a, cut, i, parts.data() + i * chunks * 2 * a.groups);

    const auto prepare = [&](int64_t sample, float* constants) {
      forward_constants(a, cut, sample, constants);
    };
    for_norm_chunks(cut, begin, end, prepare, [&](const NormChunk& c) {
      kernels().group_norm_forward(a, cut, c.first, c.n, c.constants);
    });
  }
}

void group_norm_silu_backward(const GroupNorm& a) {
  const NormCut cut = cut_of(a);
  const int64_t chunks = chunks_of(cut), step = samples_at_once(cut, 2 * bytes(a.type) + sizeof(float));
  std::vector<float> parts(a.B * chunks * 2 * a.C);
  // du stays in fp32 whatever the dtype, because dx is a difference of large terms.
  // Where dx is fp32 its own memory holds du meanwhile.
  const Aligned memory(a.type == Type::f32 ? 0 : std::min(a.B, step) * cut.n);
  for (int64_t begin = 0; begin < a.B; begin += step) {
    const int64_t end = std::min(a.B, begin + step);
    float* const du = a.type == Type::f32 ? static_cast<float*>(a.dx) + begin * cut.n : memory.p;

    const auto prepare = [&](int64_t sample, float* constants) {
      forward_constants(a, cut, sample, constants);
    };
    for_norm_chunks(cut, begin, end, prepare, [&](const NormChunk& c) {
      float* sums = parts.data() + (c.sample * chunks + c.index) * 2 * a.C;
      kernels().group_norm_sums(a, cut, c.first, c.n, c.constants, c.scratch, du + c.first - begin * cut.n,
                                sums);
    });
    for (int64_t i = begin; i < end; ++i) {
      join_sums(a, cut, i, parts.data() + i * chunks * 2 * a.C);
      group_slopes(a, cut, i);
    }

    const auto prepare_all = [&](int64_t sample, float* constants) {
      backward_constants(a, cut, sample, constants);
    };
    for_norm_chunks(cut, begin, end, prepare_all, [&](const NormChunk& c) {
      kernels().group_norm_backward(a, cut, c.first, c.n, c.constants, du + c.first - begin * cut.n);
    });
  }
  for (int64_t c = 0; c < a.C; ++c) {
    double dbias = 0, dweight = 0;
    for (int64_t i = 0; i < a.B; ++i) {
      dbias += a.sums[2 * i * a.C + c];
      dweight += a.sums[(2 * i + 1) * a.C + c];
    }
    a.dbias[c] = float(dbias), a.dweight[c] = float(dweight);
  }
}

}  // namespace cpu
}  // namespace sae
