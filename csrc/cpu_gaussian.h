// The Gaussian bottleneck and the squared error on the CPU, chunk by chunk. Included by cpu_kernels.h.

// Lane 4 q + j works on block q + j L / 4: then the 4 x 4 transpositions leave the normals in stream order.
struct BlockOfLane {
  alignas(64) uint64_t even[L / 2] = {}, odd[L / 2] = {};
  constexpr BlockOfLane() {
    for (int i = 0; i < L; i += 2) even[i / 2] = i / 4 + i % 4 * (L / 4), odd[i / 2] = i / 4 + (i + 1) % 4 * (L / 4);
  }
};
constexpr BlockOfLane kBlockOfLane;

// eps[i] = element (first / 4 * 4 + i) of the stream, for i < n rounded up to 4 L.
static __attribute__((noinline)) void fill_normals(uint64_t seed, uint64_t first, int64_t n, float* eps) {
  const PhiloxKey key = {uint32_t(seed), uint32_t(seed >> 32)};
  const W even = *(const W*)kBlockOfLane.even, odd = *(const W*)kBlockOfLane.odd;
  const int64_t blocks = (n + 4 * L - 1) / (4 * L);           // L of Philox's blocks each
  F* out = (F*)eps;
  // Two loops: the body of one would be longer than what a processor looks ahead, and both are long chains.
  for (int64_t i = 0; i < blocks; ++i) {
    const uint64_t block = first / 4 + i * L;
    W c[2][4] = {{block + even, (block + even) >> 32, W{}, W{}}, {block + odd, (block + odd) >> 32, W{}, W{}}};
    philox(c, key);
    for (int j = 0; j < 4; ++j) out[4 * i + j] = bits<F>((c[0][j] & 0xFFFFFFFFu) | c[1][j] << 32);
  }
  for (int64_t i = 0; i < blocks; ++i) {
    U words[4];
    for (int j = 0; j < 4; ++j) words[j] = bits<U>(out[4 * i + j]);
    F v[4];
    normals<F, I>(words, v);
    transpose4(v);
    for (int j = 0; j < 4; ++j) out[4 * i + j] = v[j];
  }
}

constexpr int64_t kStrip = 256;                               // so much noise at a time, while the memory that it meets is fetched

SAE_INLINE F clamp_logvar(F v) { return clamp(v, -30.f, 20.f); }
template <class E>
SAE_INLINE void fetch(const E* p, int64_t n) {
  for (int64_t i = 0; i < n; i += 64 / int64_t(sizeof(E))) __builtin_prefetch(p + i);
}

// z = mu + exp(logvar / 2) eps,  KL = 1/2 sum(mu^2 + var - 1 - logvar)
template <class T>
inline double gaussian_forward(const typename T::Element* mu, const typename T::Element* logvar, uint64_t seed, uint64_t first,
                               int64_t n, typename T::Element* z) {
  alignas(64) float noise[kStrip + 8 * L];
  Doubles total = {};
  for (int64_t strip = 0; strip < n; strip += kStrip) {
    const int64_t end = n - strip < kStrip ? n : strip + kStrip;
    fetch(mu + strip, end - strip);
    fetch(logvar + strip, end - strip);
    fill_normals(seed, first + strip, end - strip + int64_t(first % 4), noise);
    const float* eps = noise + first % 4;
    F kl = {};
    for_lanes(strip, end, [&](int64_t i, int64_t left) __attribute__((always_inline)) {
      const F m = load_some<T>(mu + i, left), v = clamp_logvar(load_some<T>(logvar + i, left));
      const F std = exp_clamped(0.5f * v);
      kl += fused(m, m, fused(std, std, F{} - 1.f) - v);      // the padding has mu = logvar = 0: exactly 0
      store_some<T>(z + i, fused(std, *(const FUnaligned*)(eps + i - strip), m), left);
    });
    total += to_doubles(kl);
  }
  return 0.5 * sum_lanes(total);
}

// d mu = dz + dkl mu,  d logvar = dz std eps / 2 + dkl (var - 1) / 2 where logvar is inside (-30, 20), else 0
template <class T>
inline void gaussian_backward(const typename T::Element* dz, float dkl, const typename T::Element* mu,
                              const typename T::Element* logvar, uint64_t seed, uint64_t first, int64_t n,
                              typename T::Element* dmu, typename T::Element* dlogvar) {
  alignas(64) float noise[kStrip + 8 * L];
  for (int64_t strip = 0; strip < n; strip += kStrip) {
    const int64_t end = n - strip < kStrip ? n : strip + kStrip;
    fetch(mu + strip, end - strip);
    fetch(logvar + strip, end - strip);
    fetch(dz + strip, end - strip);
    fill_normals(seed, first + strip, end - strip + int64_t(first % 4), noise);
    const float* eps = noise + first % 4;
    for_lanes(strip, end, [&](int64_t i, int64_t left) __attribute__((always_inline)) {
      const F m = load_some<T>(mu + i, left), g = load_some<T>(dz + i, left), raw = load_some<T>(logvar + i, left);
      const F std = exp_clamped(0.5f * clamp_logvar(raw));
      const F dv = 0.5f * fused(g * std, *(const FUnaligned*)(eps + i - strip), dkl * fused(std, std, F{} - 1.f));
      store_some<T>(dmu + i, fused(m, F{} + dkl, g), left);
      store_some<T>(dlogvar + i, select((raw > -30.f) & (raw < 20.f), dv, F{}), left);
    });
  }
}

constexpr int64_t kFold = 16 * L;                             // so many elements are summed in fp32 before they join doubles

template <class T>
inline double sum_of_squares(const typename T::Element* a, const typename T::Element* b, int64_t n) {
  F sum = {};
  Doubles total = {};
  int64_t i = 0;
  for (; i + L <= n; i += L) {
    const F d = T::load(a + i) - T::load(b + i);
    sum = fused(d, d, sum);
    if ((i + L) % kFold == 0) total += to_doubles(sum), sum = F{};
  }
  const F d = load_some<T>(a + i, n - i) - load_some<T>(b + i, n - i);
  return sum_lanes(total + to_doubles(fused(d, d, sum)));
}
template <class T>
inline void difference(float scale, const typename T::Element* a, const typename T::Element* b, int64_t n, typename T::Element* d) {
  for_lanes(0, n, [&](int64_t i, int64_t left) __attribute__((always_inline)) {
    store_some<T>(d + i, scale * (load_some<T>(a + i, left) - load_some<T>(b + i, left)), left);
  });
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
