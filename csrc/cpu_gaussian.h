// The Gaussian bottleneck and the squared error on the CPU, one chunk of a sample. Included by cpu_isa.h.
//
//   for each strip of 256 elements:              so that its noise stays in the L1 cache
//     ask for the strip's memory
//     eps = the strip's noise, from its counters (noise.h)
//     for each vector of it:
//       std = exp(logvar / 2)
//       forward    z = mu + std eps;  KL += mu^2 + var - 1 - logvar
//       backward   d mu = dz + dkl mu;  d logvar = dz std eps / 2 + dkl (var - 1) / 2

// Lane 4 q + j works on block q + j L / 4: then the 4 x 4 transpositions leave the normals in stream order.
struct BlockOfLane {
  alignas(64) uint64_t even[L / 2] = {}, odd[L / 2] = {};
  constexpr BlockOfLane() {
    for (int i = 0; i < L; i += 2) {
      even[i / 2] = i / 4 + i % 4 * (L / 4);
      odd[i / 2] = i / 4 + (i + 1) % 4 * (L / 4);
    }
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
    W c[2][4] = {{block + even, (block + even) >> 32, W{}, W{}},
                 {block + odd, (block + odd) >> 32, W{}, W{}}};
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

constexpr int64_t kStrip = 256;                               // elements of a strip

SAE_INLINE F clamp_logvar(F v) { return clamp(v, -30.f, 20.f); }
template <class E>
SAE_INLINE void fetch(const E* p, int64_t n) {
  for (int64_t i = 0; i < n; i += 64 / int64_t(sizeof(E))) __builtin_prefetch(p + i);
}

// The strips of n elements: body(begin, end, eps), eps[i - begin] the noise of element i, which is first + i
// of the stream. `arrays` are the tensors that body reads.
template <class Body, class... Arrays>
SAE_INLINE void for_strips(uint64_t seed, uint64_t first, int64_t n, Body body, const Arrays*... arrays) {
  alignas(64) float noise[kStrip + 8 * L];
  for (int64_t begin = 0; begin < n; begin += kStrip) {
    const int64_t end = n - begin < kStrip ? n : begin + kStrip;
    (fetch(arrays + begin, end - begin), ...);
    fill_normals(seed, first + begin, end - begin + int64_t(first % 4), noise);
    body(begin, end, noise + first % 4);
  }
}

// z = mu + exp(logvar / 2) eps,  KL = 1/2 sum(mu^2 + var - 1 - logvar)
template <class T>
inline double gaussian_forward(const Gaussian& a, int64_t at, int64_t n) {
  typedef typename T::Element E;
  const E *const mu = static_cast<const E*>(a.mu) + at, *const logvar = static_cast<const E*>(a.logvar) + at;
  E* const z = static_cast<E*>(a.z) + at;
  Doubles total = {};
  const auto strip = [&](int64_t begin, int64_t end, const float* eps) __attribute__((always_inline)) {
    F kl = {};
    for_lanes(begin, end, [&](int64_t i, int64_t left) __attribute__((always_inline)) {
      const F m = load_some<T>(mu + i, left), v = clamp_logvar(load_some<T>(logvar + i, left));
      const F std = exp_clamped(0.5f * v);
      kl += fused(m, m, fused(std, std, F{} - 1.f) - v);      // the padding has mu = logvar = 0: exactly 0
      store_some<T>(z + i, fused(std, *(const FUnaligned*)(eps + i - begin), m), left);
    });
    total += to_doubles(kl);
  };
  for_strips(a.seed, a.offset + at, n, strip, mu, logvar);
  return 0.5 * sum_lanes(total);
}

// d mu = dz + dkl mu,  d logvar = dz std eps / 2 + dkl (var - 1) / 2 where logvar is inside (-30, 20), else 0
template <class T>
inline void gaussian_backward(const Gaussian& a, float dkl, int64_t at, int64_t n) {
  typedef typename T::Element E;
  const E *const mu = static_cast<const E*>(a.mu) + at, *const logvar = static_cast<const E*>(a.logvar) + at;
  const E* const dz = static_cast<const E*>(a.dz) + at;
  E *const dmu = static_cast<E*>(a.dmu) + at, *const dlogvar = static_cast<E*>(a.dlogvar) + at;
  const auto strip = [&](int64_t begin, int64_t end, const float* eps) __attribute__((always_inline)) {
    for_lanes(begin, end, [&](int64_t i, int64_t left) __attribute__((always_inline)) {
      const F m = load_some<T>(mu + i, left), g = load_some<T>(dz + i, left);
      const F raw = load_some<T>(logvar + i, left), noise = *(const FUnaligned*)(eps + i - begin);
      const F std = exp_clamped(0.5f * clamp_logvar(raw));
      const F dv = 0.5f * fused(g * std, noise, dkl * fused(std, std, F{} - 1.f));
      store_some<T>(dmu + i, fused(m, F{} + dkl, g), left);
      store_some<T>(dlogvar + i, select((raw > -30.f) & (raw < 20.f), dv, F{}), left);
    });
  };
  for_strips(a.seed, a.offset + at, n, strip, mu, logvar, dz);
}

constexpr int64_t kFold = 16 * L;  // so many elements are summed in fp32 before they join doubles

// sum (a - b)^2
template <class T>
inline double sum_of_squares(const SquaredError& e, int64_t first, int64_t n) {
  typedef typename T::Element E;
  const E *const a = static_cast<const E*>(e.a) + first, *const b = static_cast<const E*>(e.b) + first;
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

// da = 2 dmean (a - b) / (elements of the whole tensor)
template <class T>
inline void scaled_difference(const SquaredError& e, int64_t first, int64_t n) {
  typedef typename T::Element E;
  const E *const a = static_cast<const E*>(e.a) + first, *const b = static_cast<const E*>(e.b) + first;
  E* const da = static_cast<E*>(e.da) + first;
  const float scale = float(2.0 * *e.dmean / double(e.n));
  for_lanes(0, n, [&](int64_t i, int64_t left) __attribute__((always_inline)) {
    store_some<T>(da + i, scale * (load_some<T>(a + i, left) - load_some<T>(b + i, left)), left);
  });
}

inline double reparameterize_forward(const Gaussian& a, int64_t sample, int64_t first, int64_t n) {
  const int64_t at = sample * a.n + first;
  if (a.type == Type::f32) return gaussian_forward<F32>(a, at, n);
  if (a.type == Type::bf16) return gaussian_forward<BF16>(a, at, n);
  return gaussian_forward<F16>(a, at, n);
}
inline void reparameterize_backward(const Gaussian& a, int64_t sample, int64_t first, int64_t n) {
  const int64_t at = sample * a.n + first;
  if (a.type == Type::f32) return gaussian_backward<F32>(a, a.dkl[sample], at, n);
  if (a.type == Type::bf16) return gaussian_backward<BF16>(a, a.dkl[sample], at, n);
  gaussian_backward<F16>(a, a.dkl[sample], at, n);
}
inline double squared_error_forward(const SquaredError& e, int64_t first, int64_t n) {
  if (e.type == Type::f32) return sum_of_squares<F32>(e, first, n);
  if (e.type == Type::bf16) return sum_of_squares<BF16>(e, first, n);
  return sum_of_squares<F16>(e, first, n);
}
inline void squared_error_backward(const SquaredError& e, int64_t first, int64_t n) {
  if (e.type == Type::f32) return scaled_difference<F32>(e, first, n);
  if (e.type == Type::bf16) return scaled_difference<BF16>(e, first, n);
  scaled_difference<F16>(e, first, n);
}
