// SiLU of group norm on the CPU, chunk by chunk. Included by cpu_kernels.h.
//
// Memory is channels last: rows of C channels. Constants of a channel repeat every `columns` elements, whole vectors of them even
// if C is no multiple of L, so a chunk is one stream of vectors: at element i the constants are those of column i % columns.

struct At {                                                   // one vector of a chunk: all of its lanes count, except in the last one
  int64_t i, column, lanes;
};
template <class Body>
SAE_INLINE void for_vectors(int64_t n, int64_t columns, Body body) {
  int64_t row = 0;
  for (; row + columns <= n; row += columns)
    for (int64_t j = 0; j < columns; j += L) body(At{row + j, j, L});
  for_lanes(row, n, [&](int64_t i, int64_t lanes) __attribute__((always_inline)) { body(At{i, i - row, lanes}); });
}
template <class T>
SAE_INLINE F load_lanes(const typename T::Element* p, At at) { return load_some<T>(p + at.i, at.lanes); }
template <class T>
SAE_INLINE void store_lanes(typename T::Element* p, F v, At at) { store_some<T>(p + at.i, v, at.lanes); }
SAE_INLINE F first_lanes(F v, At at) { return load_some<F32>((const float*)&v, at.lanes); }
SAE_INLINE F at_column(const float* constants, At at) { return *(const F*)(constants + at.column); }

// [columns] -> sums over each group, [groups]
inline void fold_groups(const float* columns, const NormShape& s, double* sums) {
  const int64_t width = s.C / s.groups;
  for (int64_t g = 0; g < s.groups; ++g) sums[g] = 0;
  for (int64_t row = 0; row < s.columns; row += s.C)
    for (int64_t g = 0; g < s.groups; ++g) {
      const float* p = columns + row + g * width;
      double sum = 0;
      int64_t c = 0;
      for (; c + 4 <= width; c += 4) sum += double(p[c] + p[c + 1]) + double(p[c + 2] + p[c + 3]);
      for (; c < width; ++c) sum += p[c];
      sums[g] += sum;
    }
}
// [groups] -> [columns]
inline void spread_groups(const double* values, double factor, const NormShape& s, float* columns) {
  const int64_t width = s.C / s.groups;
  for (int64_t row = 0; row < s.columns; row += s.C)
    for (int64_t g = 0; g < s.groups; ++g) {
      const float value = float(values[g] * factor);
      for (int64_t c = 0; c < width; ++c) columns[row + g * width + c] = value;
    }
}

// Mean and sum of squared deviations of each group of a chunk. The chunk is read twice, the second time from the cache, so that the
// deviations are those from its own mean: sums of x^2 would lose everything where the mean is far larger than the deviations.
template <class T>
inline void moments(const NormShape& s, const typename T::Element* x, int64_t n, float* scratch, double* mean, double* square) {
  float *sum = scratch, *squares = sum + s.columns, *center = squares + s.columns;
  const double count = double(n / s.groups);
  for (int64_t j = 0; j < s.columns; j += L) *(F*)(sum + j) = F{};
  for_vectors(n, s.columns, [&](At at) { *(F*)(sum + at.column) += load_lanes<T>(x, at); });
  fold_groups(sum, s, mean);
  spread_groups(mean, 1 / count, s, center);
  for (int64_t j = 0; j < s.columns; j += L) *(F*)(sum + j) = *(F*)(squares + j) = F{};
  for_vectors(n, s.columns, [&](At at) {
    const F d = first_lanes(load_lanes<T>(x, at) - at_column(center, at), at);
    *(F*)(sum + at.column) += d;
    *(F*)(squares + at.column) = fused(d, d, at_column(squares, at));
  });
  fold_groups(sum, s, mean);                                  // what rounding left between the center and the mean
  fold_groups(squares, s, square);
  for (int64_t g = 0; g < s.groups; ++g) {
    square[g] -= mean[g] * mean[g] / count;
    mean[g] = center[g * (s.C / s.groups)] + mean[g] / count;
  }
}

// 1 / (1 + e^-u); beyond 87 off by no more than e^-87. A NaN stays.
SAE_INLINE F sigmoid(F u) { return reciprocal(1.f + exp_clamped(clamp(-u, -87.f, 87.f))); }

// u = (x - mean) rstd weight + bias,  y = u sigmoid(u);  constants [3, columns]: mean, rstd weight, bias
template <class T>
inline void norm_apply(const NormShape& s, const typename T::Element* x, int64_t n, const float* constants, typename T::Element* y) {
  const float *mean = constants, *scale = mean + s.columns, *bias = scale + s.columns;
  for_vectors(n, s.columns, [&](At at) {
    const F u = fused(load_lanes<T>(x, at) - at_column(mean, at), at_column(scale, at), at_column(bias, at));
    store_lanes<T>(y, u * sigmoid(u), at);
  });
}

// du = dy sigmoid(u) (1 + u (1 - sigmoid(u)))
SAE_INLINE F silu_gradient(F dy, F u) {
  const F sigma = sigmoid(u);
  return dy * sigma * fused(u, 1.f - sigma, F{} + 1.f);
}

// du, for the second pass, which is spared the exponential, and sums of each channel of a chunk: du, du (x - mean). sums: [2, C]
template <class T>
inline void norm_sums(const NormShape& s, const typename T::Element* dy, const typename T::Element* x, int64_t n,
                      const float* constants, float* scratch, float* du, float* sums) {
  const float *mean = constants, *scale = mean + s.columns, *bias = scale + s.columns;
  float *sum = scratch, *product = sum + s.columns;
  for (int64_t j = 0; j < s.columns; j += L) *(F*)(sum + j) = *(F*)(product + j) = F{};
  for_vectors(n, s.columns, [&](At at) {
    const F d = load_lanes<T>(x, at) - at_column(mean, at);   // past the end dy is 0, and so is du
    const F g = silu_gradient(load_lanes<T>(dy, at), fused(d, at_column(scale, at), at_column(bias, at)));
    *(F*)(sum + at.column) += g;
    *(F*)(product + at.column) = fused(g, d, at_column(product, at));
    store_lanes<F32>(du, g, at);
  });
  for (int64_t c = 0; c < s.C; ++c) {
    sums[c] = sums[s.C + c] = 0;
    for (int64_t j = c; j < s.columns; j += s.C) sums[c] += sum[j], sums[s.C + c] += product[j];
  }
}

// dx = rstd weight du - (offset + slope (x - mean));  constants [5, columns]: mean, rstd weight, bias, offset, slope
template <class T>
inline void norm_gradient(const NormShape& s, const float* du, const typename T::Element* x, int64_t n, const float* constants,
                          typename T::Element* dx) {
  const float *mean = constants, *scale = mean + s.columns, *offset = scale + 2 * s.columns, *slope = offset + s.columns;
  for_vectors(n, s.columns, [&](At at) {
    const F d = load_lanes<T>(x, at) - at_column(mean, at), rest = fused(d, at_column(slope, at), at_column(offset, at));
    store_lanes<T>(dx, fused(load_lanes<F32>(du, at), at_column(scale, at), -rest), at);
  });
}

inline void group_norm_moments(const NormShape& s, Type type, const void* x, int64_t n, float* scratch, double* mean,
                               double* square) {
  if (type == Type::f32) return moments<F32>(s, (In32)x, n, scratch, mean, square);
  if (type == Type::bf16) return moments<BF16>(s, (In16)x, n, scratch, mean, square);
  moments<F16>(s, (In16)x, n, scratch, mean, square);
}
inline void group_norm_forward(const NormShape& s, Type type, const void* x, int64_t n, const float* constants, void* y) {
  if (type == Type::f32) return norm_apply<F32>(s, (In32)x, n, constants, (float*)y);
  if (type == Type::bf16) return norm_apply<BF16>(s, (In16)x, n, constants, (uint16_t*)y);
  norm_apply<F16>(s, (In16)x, n, constants, (uint16_t*)y);
}
inline void group_norm_sums(const NormShape& s, Type type, const void* dy, const void* x, int64_t n, const float* constants,
                            float* scratch, float* du, float* sums) {
  if (type == Type::f32) return norm_sums<F32>(s, (In32)dy, (In32)x, n, constants, scratch, du, sums);
  if (type == Type::bf16) return norm_sums<BF16>(s, (In16)dy, (In16)x, n, constants, scratch, du, sums);
  norm_sums<F16>(s, (In16)dy, (In16)x, n, constants, scratch, du, sums);
}
inline void group_norm_backward(const NormShape& s, Type type, const float* du, const void* x, int64_t n, const float* constants,
                                void* dx) {
  if (type == Type::f32) return norm_gradient<F32>(s, du, (In32)x, n, constants, (float*)dx);
  if (type == Type::bf16) return norm_gradient<BF16>(s, du, (In16)x, n, constants, (uint16_t*)dx);
  norm_gradient<F16>(s, du, (In16)x, n, constants, (uint16_t*)dx);
}
