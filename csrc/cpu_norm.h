// SiLU of group norm on the CPU, one chunk of rows at a time. Included by cpu_isa.h.
//
//   forward                                      backward
//     moments of each group of a chunk             u = (x - mean) scale + bias;  du = dy silu'(u)
//     (joined over chunks by cpu_ops.cpp)          sums of each channel of a chunk: du, du (x - mean)
//     scale = rstd weight                          (joined over chunks by cpu_ops.cpp)
//     u = (x - mean) scale + bias                  dx = scale du - (offset + slope (x - mean))
//     y = u sigmoid(u)
//
// Memory is channels last: rows of C channels. Constants of a channel repeat every `columns` elements, whole
// vectors of them even if C is no multiple of L, so a chunk is one stream of vectors: at element i the
// constants are those of column i % columns.

struct At {  // one vector of a chunk: all of its lanes count, except in the last one
  int64_t i, column, lanes;
};
template <class Body>
SAE_INLINE void for_vectors(int64_t n, int64_t columns, Body body) {
  int64_t row = 0;
  for (; row + columns <= n; row += columns)
    for (int64_t j = 0; j < columns; j += L) body(At{row + j, j, L});
  for_lanes(row, n,
            [&](int64_t i, int64_t lanes) __attribute__((always_inline)) { body(At{i, i - row, lanes}); });
}
template <class T>
SAE_INLINE F load_lanes(const typename T::Element* p, At at) { return load_some<T>(p + at.i, at.lanes); }
template <class T>
SAE_INLINE void store_lanes(typename T::Element* p, F v, At at) { store_some<T>(p + at.i, v, at.lanes); }
SAE_INLINE F first_lanes(F v, At at) { return load_some<F32>((const float*)&v, at.lanes); }
SAE_INLINE F at_column(const float* constants, At at) { return *(const F*)(constants + at.column); }

// [columns] -> sums over each group, [groups]
inline void fold_groups(const float* columns, const GroupNorm& a, const NormCut& cut, double* sums) {
  const int64_t width = a.C / a.groups;
  for (int64_t g = 0; g < a.groups; ++g) sums[g] = 0;
  for (int64_t row = 0; row < cut.columns; row += a.C)
    for (int64_t g = 0; g < a.groups; ++g) {
      const float* p = columns + row + g * width;
      double sum = 0;
      int64_t c = 0;
      for (; c + 4 <= width; c += 4) sum += double(p[c] + p[c + 1]) + double(p[c + 2] + p[c + 3]);
      for (; c < width; ++c) sum += p[c];
      sums[g] += sum;
    }
}
// [groups] -> [columns]
inline void spread_groups(const double* values, double factor, const GroupNorm& a, const NormCut& cut,
                          float* columns) {
  const int64_t width = a.C / a.groups;
  for (int64_t row = 0; row < cut.columns; row += a.C)
    for (int64_t g = 0; g < a.groups; ++g) {
      const float value = float(values[g] * factor);
      for (int64_t c = 0; c < width; ++c) columns[row + g * width + c] = value;
    }
}

// Mean and sum of squared deviations of each group of a chunk. The chunk is read twice, the second time from
// the cache, so that the deviations are those from its own mean: sums of x^2 would lose everything where the
// mean is far larger than the deviations.
template <class T>
inline void moments(const GroupNorm& a, const NormCut& cut, int64_t first, int64_t n, float* scratch,
                    double* mean, double* square) {
  const auto* const x = static_cast<const typename T::Element*>(a.x) + first;
  const int64_t columns = cut.columns;
  float *sum = scratch, *squares = sum + columns, *center = squares + columns;
  const double count = double(n / a.groups);
  for (int64_t j = 0; j < columns; j += L) *(F*)(sum + j) = F{};
  for_vectors(n, columns, [&](At at) { *(F*)(sum + at.column) += load_lanes<T>(x, at); });
  fold_groups(sum, a, cut, mean);
  spread_groups(mean, 1 / count, a, cut, center);

  for (int64_t j = 0; j < columns; j += L) *(F*)(sum + j) = *(F*)(squares + j) = F{};
  for_vectors(n, columns, [&](At at) {
    const F d = first_lanes(load_lanes<T>(x, at) - at_column(center, at), at);
    *(F*)(sum + at.column) += d;
    *(F*)(squares + at.column) = fused(d, d, at_column(squares, at));
  });
  fold_groups(sum, a, cut, mean);  // what rounding left between the center and the mean
  fold_groups(squares, a, cut, square);
  for (int64_t g = 0; g < a.groups; ++g) {
    square[g] -= mean[g] * mean[g] / count;
    mean[g] = center[g * (a.C / a.groups)] + mean[g] / count;
  }
}

// 1 / (1 + e^-u); beyond 87 off by no more than e^-87. A NaN stays.
SAE_INLINE F sigmoid(F u) { return reciprocal(1.f + exp_clamped(clamp(-u, -87.f, 87.f))); }

// u = (x - mean) rstd weight + bias,  y = u sigmoid(u);  constants [3, columns]: mean, rstd weight, bias
template <class T>
inline void norm_apply(const GroupNorm& a, const NormCut& cut, int64_t first, int64_t n,
                       const float* constants) {
  typedef typename T::Element E;
  const E* const x = static_cast<const E*>(a.x) + first;
  E* const y = static_cast<E*>(a.y) + first;
  const float *mean = constants, *scale = mean + cut.columns, *bias = scale + cut.columns;
  for_vectors(n, cut.columns, [&](At at) {
    const F u = fused(load_lanes<T>(x, at) - at_column(mean, at), at_column(scale, at), at_column(bias, at));
    store_lanes<T>(y, u * sigmoid(u), at);
  });
}

// du = dy sigmoid(u) (1 + u (1 - sigmoid(u)))
SAE_INLINE F silu_gradient(F dy, F u) {
  const F sigma = sigmoid(u);
  return dy * sigma * fused(u, 1.f - sigma, F{} + 1.f);
}

// du, so that the second pass is spared the exponential, and of each channel of the chunk sum du and
// sum du (x - mean): sums [2, C].
template <class T>
inline void norm_sums(const GroupNorm& a, const NormCut& cut, int64_t first, int64_t n,
                      const float* constants, float* scratch, float* du, float* sums) {
  typedef typename T::Element E;
  const E *const x = static_cast<const E*>(a.x) + first, *const dy = static_cast<const E*>(a.dy) + first;
  const int64_t columns = cut.columns, C = a.C;
  const float *mean = constants, *scale = mean + columns, *bias = scale + columns;
  float *sum = scratch, *product = sum + columns;
  for (int64_t j = 0; j < columns; j += L) *(F*)(sum + j) = *(F*)(product + j) = F{};
  for_vectors(n, columns, [&](At at) {
    const F d = load_lanes<T>(x, at) - at_column(mean, at);   // past the end dy is 0, and so is du
    const F g = silu_gradient(load_lanes<T>(dy, at), fused(d, at_column(scale, at), at_column(bias, at)));
    *(F*)(sum + at.column) += g;
    *(F*)(product + at.column) = fused(g, d, at_column(product, at));
    store_lanes<F32>(du, g, at);
  });
  for (int64_t c = 0; c < C; ++c) {
    sums[c] = sums[C + c] = 0;
    for (int64_t j = c; j < columns; j += C) {
      sums[c] += sum[j];
      sums[C + c] += product[j];
    }
  }
}

// dx = rstd weight du - (offset + slope (x - mean))
// constants [5, columns]: mean, rstd weight, bias, offset, slope
template <class T>
inline void norm_gradient(const GroupNorm& a, const NormCut& cut, int64_t first, int64_t n,
                          const float* constants, const float* du) {
  typedef typename T::Element E;
  const E* const x = static_cast<const E*>(a.x) + first;
  E* const dx = static_cast<E*>(a.dx) + first;
  const int64_t columns = cut.columns;
  const float *mean = constants, *scale = mean + columns;
  const float *offset = constants + 3 * columns, *slope = offset + columns;
  for_vectors(n, columns, [&](At at) {
    const F d = load_lanes<T>(x, at) - at_column(mean, at);
    const F rest = fused(d, at_column(slope, at), at_column(offset, at));
    store_lanes<T>(dx, fused(load_lanes<F32>(du, at), at_column(scale, at), -rest), at);
  });
}

inline void group_norm_moments(const GroupNorm& a, const NormCut& cut, int64_t first, int64_t n,
                               float* scratch, double* mean, double* square) {
  if (a.type == Type::f32) return moments<F32>(a, cut, first, n, scratch, mean, square);
  if (a.type == Type::bf16) return moments<BF16>(a, cut, first, n, scratch, mean, square);
  moments<F16>(a, cut, first, n, scratch, mean, square);
}
inline void group_norm_forward(const GroupNorm& a, const NormCut& cut, int64_t first, int64_t n,
                               const float* constants) {
  if (a.type == Type::f32) return norm_apply<F32>(a, cut, first, n, constants);
  if (a.type == Type::bf16) return norm_apply<BF16>(a, cut, first, n, constants);
  norm_apply<F16>(a, cut, first, n, constants);
}
inline void group_norm_sums(const GroupNorm& a, const NormCut& cut, int64_t first, int64_t n,
                            const float* constants, float* scratch, float* du, float* sums) {
  if (a.type == Type::f32) return norm_sums<F32>(a, cut, first, n, constants, scratch, du, sums);
  if (a.type == Type::bf16) return norm_sums<BF16>(a, cut, first, n, constants, scratch, du, sums);
  norm_sums<F16>(a, cut, first, n, constants, scratch, du, sums);
}
inline void group_norm_backward(const GroupNorm& a, const NormCut& cut, int64_t first, int64_t n,
                                const float* constants, const float* du) {
  if (a.type == Type::f32) return norm_gradient<F32>(a, cut, first, n, constants, du);
  if (a.type == Type::bf16) return norm_gradient<BF16>(a, cut, first, n, constants, du);
  norm_gradient<F16>(a, cut, first, n, constants, du);
}
