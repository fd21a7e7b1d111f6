// The Gaussian bottleneck and the squared error on the CPU, chunk by chunk. Included by cpu_kernels.h.

// eps[i] = element (first / 4 * 4 + i) of the stream, for i < n rounded up to 4 L.
inline void fill_normals(uint64_t seed, uint64_t first, int64_t n, float* eps) {
  const PhiloxKey key = {uint32_t(seed), uint32_t(seed >> 32)};
  // Lane 4 q + j works on block q + j L / 4: then the 4 x 4 transpositions leave the normals in stream order.
  U lane;
  for (int i = 0; i < L; ++i) lane[i] = uint32_t(i / 4 + i % 4 * (L / 4));
  for (uint64_t block = first / 4; n > 0; block += L, n -= 4 * L, eps += 4 * L) {
    const U lo = uint32_t(block) + lane, carry = bits<U>(lo < uint32_t(block)) & 1u;
    F v[4];
    normals<F, I>(lo, uint32_t(block >> 32) + carry, key, v);
    transpose4(v);
    for (int j = 0; j < 4; ++j) *(F*)(eps + j * L) = v[j];
  }
}

constexpr int64_t kFold = 16 * L;                             // so many elements are summed in fp32 before they join a double

SAE_INLINE F clamp_logvar(F v) { return clamp(v, -30.f, 20.f); }

// z = mu + exp(logvar / 2) eps,  KL = 1/2 sum(mu^2 + var - 1 - logvar)
template <class T>
inline double gaussian_forward(const typename T::Element* mu, const typename T::Element* logvar, uint64_t seed, uint64_t first,
                               int64_t n, typename T::Element* z) {
  alignas(64) float noise[kChunk + 8 * L];
  const float* eps = noise + first % 4;
  fill_normals(seed, first, n + int64_t(first % 4), noise);
  F kl = {};
  double total = 0;
  for (int64_t i = 0; i < n; i += L) {
    const int64_t left = n - i;
    const F m = left >= L ? T::load(mu + i) : load_some<T>(mu + i, left);
    const F v = clamp_logvar(left >= L ? T::load(logvar + i) : load_some<T>(logvar + i, left));
    const F std = exp_clamped(0.5f * v), x = fused(std, *(const FUnaligned*)(eps + i), m);
    kl += fused(m, m, fused(std, std, F{} - 1.f) - v);        // the padding has mu = logvar = 0: exactly 0
    if (left >= L)
      T::store(z + i, x);
    else
      store_some<T>(z + i, x, left);
    if ((i + L) % kFold == 0 || i + L >= n) total += sum_lanes(kl), kl = F{};
  }
  return 0.5 * total;
}

// d mu = dz + dkl mu,  d logvar = dz std eps / 2 + dkl (var - 1) / 2 where logvar is inside (-30, 20), else 0
template <class T>
inline void gaussian_backward(const typename T::Element* dz, float dkl, const typename T::Element* mu,
                              const typename T::Element* logvar, uint64_t seed, uint64_t first, int64_t n,
                              typename T::Element* dmu, typename T::Element* dlogvar) {
  alignas(64) float noise[kChunk + 8 * L];
  const float* eps = noise + first % 4;
  fill_normals(seed, first, n + int64_t(first % 4), noise);
  for (int64_t i = 0; i < n; i += L) {
    const int64_t left = n - i;
    const bool whole = left >= L;
    const F m = whole ? T::load(mu + i) : load_some<T>(mu + i, left), g = whole ? T::load(dz + i) : load_some<T>(dz + i, left);
    const F raw = whole ? T::load(logvar + i) : load_some<T>(logvar + i, left), v = clamp_logvar(raw);
    const F std = exp_clamped(0.5f * v);
    const F dm = fused(m, F{} + dkl, g);
    F dv = 0.5f * fused(g * std, *(const FUnaligned*)(eps + i), dkl * fused(std, std, F{} - 1.f));
    dv = select((raw > -30.f) & (raw < 20.f), dv, F{});
    if (whole) {
      T::store(dmu + i, dm);
      T::store(dlogvar + i, dv);
    } else {
      store_some<T>(dmu + i, dm, left);
      store_some<T>(dlogvar + i, dv, left);
    }
  }
}

template <class T>
inline double sum_of_squares(const typename T::Element* a, const typename T::Element* b, int64_t n) {
  F sum = {};
  double total = 0;
  int64_t i = 0;
  for (; i + L <= n; i += L) {
    const F d = T::load(a + i) - T::load(b + i);
    sum = fused(d, d, sum);
    if ((i + L) % kFold == 0) total += sum_lanes(sum), sum = F{};
  }
  const F d = load_some<T>(a + i, n - i) - load_some<T>(b + i, n - i);
  return total + sum_lanes(fused(d, d, sum));
}
template <class T>
inline void difference(float scale, const typename T::Element* a, const typename T::Element* b, int64_t n, typename T::Element* d) {
  int64_t i = 0;
  for (; i + L <= n; i += L) T::store(d + i, scale * (T::load(a + i) - T::load(b + i)));
  if (i < n) store_some<T>(d + i, scale * (load_some<T>(a + i, n - i) - load_some<T>(b + i, n - i)), n - i);
}

inline double reparameterize_forward(Type type, const void* mu, const void* logvar, uint64_t seed, uint64_t first, int64_t n, void* z) {
  if (type == Type::f32) return gaussian_forward<F32>((In32)mu, (In32)logvar, seed, first, n, (float*)z);
  if (type == Type::bf16) return gaussian_forward<BF16>((In16)mu, (In16)logvar, seed, first, n, (uint16_t*)z);
  return gaussian_forward<F16>((In16)mu, (In16)logvar, seed, first, n, (uint16_t*)z);
}
inline void reparameterize_backward(Type type, const void* dz, float dkl, const void* mu, const void* logvar, uint64_t seed,
                                    uint64_t first, int64_t n, void* dmu, void* dlogvar) {
  if (type == Type::f32)
    gaussian_backward<F32>((In32)dz, dkl, (In32)mu, (In32)logvar, seed, first, n, (float*)dmu, (float*)dlogvar);
  else if (type == Type::bf16)
    gaussian_backward<BF16>((In16)dz, dkl, (In16)mu, (In16)logvar, seed, first, n, (uint16_t*)dmu, (uint16_t*)dlogvar);
  else
    gaussian_backward<F16>((In16)dz, dkl, (In16)mu, (In16)logvar, seed, first, n, (uint16_t*)dmu, (uint16_t*)dlogvar);
}
inline double squared_error(Type type, const void* a, const void* b, int64_t n) {
  if (type == Type::f32) return sum_of_squares<F32>((In32)a, (In32)b, n);
  if (type == Type::bf16) return sum_of_squares<BF16>((In16)a, (In16)b, n);
  return sum_of_squares<F16>((In16)a, (In16)b, n);
}
inline void scaled_difference(Type type, float scale, const void* a, const void* b, int64_t n, void* d) {
  if (type == Type::f32) return difference<F32>(scale, (In32)a, (In32)b, n, (float*)d);
  if (type == Type::bf16) return difference<BF16>(scale, (In16)a, (In16)b, n, (uint16_t*)d);
  difference<F16>(scale, (In16)a, (In16)b, n, (uint16_t*)d);
}
