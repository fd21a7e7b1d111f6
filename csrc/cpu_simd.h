// Vectors of SAE_LANES floats, and the few operations on them that the CPU kernels are written in.
// Included by cpu_isa.h.
#define SAE_INLINE inline __attribute__((always_inline))

constexpr int L = SAE_LANES;
typedef float F __attribute__((vector_size(4 * L)));
typedef uint32_t U __attribute__((vector_size(4 * L)));
typedef int32_t I __attribute__((vector_size(4 * L)));
typedef uint64_t W __attribute__((vector_size(4 * L)));       // half as many lanes
typedef uint16_t U16 __attribute__((vector_size(2 * L)));
typedef double Doubles __attribute__((vector_size(8 * L)));
typedef float FUnaligned __attribute__((vector_size(4 * L), aligned(4), may_alias));
typedef uint16_t U16Unaligned __attribute__((vector_size(2 * L), aligned(2), may_alias));

template <class To, class From>
SAE_INLINE To bits(From v) {
  static_assert(sizeof(To) == sizeof(From), "");
  To r;
  std::memcpy(&r, &v, sizeof r);
  return r;
}
template <class C, class T>
SAE_INLINE T select(C c, T a, T b) { return c ? a : b; }
SAE_INLINE F broadcast(const float* p) { return bits<F>(U{} + bits<uint32_t>(*p)); }  // whatever the bits are
SAE_INLINE F to_float(I v) { return __builtin_convertvector(v, F); }
SAE_INLINE Doubles to_doubles(F v) { return __builtin_convertvector(v, Doubles); }

#if SAE_LANES == 16
SAE_INLINE F fused(F a, F b, F c) { return (F)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
SAE_INLINE W multiply(uint32_t m, W v) { return (W)_mm512_mul_epu32((__m512i)v, _mm512_set1_epi32((int)m)); }
SAE_INLINE F square_root(F v) { return (F)_mm512_sqrt_ps((__m512)v); }
SAE_INLINE void transpose4(F (&v)[4]) {                       // 4 x 4 inside every 128 bits
  const __m512 a = _mm512_unpacklo_ps((__m512)v[0], (__m512)v[1]);
  const __m512 b = _mm512_unpackhi_ps((__m512)v[0], (__m512)v[1]);
  const __m512 c = _mm512_unpacklo_ps((__m512)v[2], (__m512)v[3]);
  const __m512 d = _mm512_unpackhi_ps((__m512)v[2], (__m512)v[3]);
  v[0] = (F)_mm512_shuffle_ps(a, c, 0x44);
  v[1] = (F)_mm512_shuffle_ps(a, c, 0xEE);
  v[2] = (F)_mm512_shuffle_ps(b, d, 0x44);
  v[3] = (F)_mm512_shuffle_ps(b, d, 0xEE);
}
SAE_INLINE F load_quads(const float* p, int64_t stride) {     // 4 floats from each of L / 4 rows
  const __m256 a = _mm256_set_m128(_mm_loadu_ps(p + stride), _mm_loadu_ps(p));
  const __m256 b = _mm256_set_m128(_mm_loadu_ps(p + 3 * stride), _mm_loadu_ps(p + 2 * stride));
  return (F)_mm512_insertf32x8(_mm512_castps256_ps512(a), b, 1);
}
SAE_INLINE F clamp(F v, float low, float high) {  // a NaN stays: min and max return their second operand then
  return (F)_mm512_min_ps(_mm512_set1_ps(high), _mm512_max_ps(_mm512_set1_ps(low), (__m512)v));
}
SAE_INLINE F reciprocal(F v) {  // of a finite v: 14 bits and a Newton step, within 1 ulp
  const F r = (F)_mm512_rcp14_ps((__m512)v);
  return fused(r, fused(-v, r, F{} + 1.f), r);
}
SAE_INLINE F bf16_to_float(U16 v) { return (F)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)v), 16); }
#ifdef SAE_BF16_PAIRS
// As below, except that denormals become 0.
SAE_INLINE U16 float_to_bf16(F v) { return (U16)_mm512_cvtneps_pbh((__m512)v); }
#else
SAE_INLINE U16 float_to_bf16(F v) {                           // round to nearest even; NaN stays NaN
  const __m512i x = (__m512i)v, up = _mm512_add_epi32(x, _mm512_set1_epi32(0x7fff));
  const __m512i even = _mm512_mask_add_epi32(up, _mm512_test_epi32_mask(x, _mm512_set1_epi32(0x10000)), up,
                                             _mm512_set1_epi32(1));
  const __mmask16 number = _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_ORD_Q);
  return (U16)_mm512_cvtepi32_epi16(_mm512_mask_srli_epi32(_mm512_set1_epi32(0x7fc0), number, even, 16));
}
#endif
SAE_INLINE F half_to_float(U16 v) { return (F)_mm512_cvtph_ps((__m256i)v); }
SAE_INLINE U16 float_to_half(F v) {
  return (U16)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#elif SAE_LANES == 8
SAE_INLINE F fused(F a, F b, F c) { return (F)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
SAE_INLINE W multiply(uint32_t m, W v) { return (W)_mm256_mul_epu32((__m256i)v, _mm256_set1_epi32((int)m)); }
SAE_INLINE F square_root(F v) { return (F)_mm256_sqrt_ps((__m256)v); }
SAE_INLINE void transpose4(F (&v)[4]) {
  const __m256 a = _mm256_unpacklo_ps((__m256)v[0], (__m256)v[1]);
  const __m256 b = _mm256_unpackhi_ps((__m256)v[0], (__m256)v[1]);
  const __m256 c = _mm256_unpacklo_ps((__m256)v[2], (__m256)v[3]);
  const __m256 d = _mm256_unpackhi_ps((__m256)v[2], (__m256)v[3]);
  v[0] = (F)_mm256_shuffle_ps(a, c, 0x44);
  v[1] = (F)_mm256_shuffle_ps(a, c, 0xEE);
  v[2] = (F)_mm256_shuffle_ps(b, d, 0x44);
  v[3] = (F)_mm256_shuffle_ps(b, d, 0xEE);
}
SAE_INLINE F load_quads(const float* p, int64_t stride) {
  return (F)_mm256_set_m128(_mm_loadu_ps(p + stride), _mm_loadu_ps(p));
}
SAE_INLINE F clamp(F v, float low, float high) {
  return (F)_mm256_min_ps(_mm256_set1_ps(high), _mm256_max_ps(_mm256_set1_ps(low), (__m256)v));
}
SAE_INLINE F reciprocal(F v) { return 1.f / v; }
SAE_INLINE F bf16_to_float(U16 v) { return (F)_mm256_slli_epi32(_mm256_cvtepu16_epi32((__m128i)v), 16); }
SAE_INLINE U16 narrow(U v) {
  return (U16)_mm256_castsi256_si128(
      _mm256_permute4x64_epi64(_mm256_packus_epi32((__m256i)v, (__m256i)v), 0x88));
}
SAE_INLINE F half_to_float(U16 v) { return (F)_mm256_cvtph_ps((__m128i)v); }
SAE_INLINE U16 float_to_half(F v) {
  return (U16)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#else
SAE_INLINE F fused(F a, F b, F c) {
  F r = {};
  for (int i = 0; i < L; ++i) r[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return r;
}
SAE_INLINE W multiply(uint32_t m, W v) { return (v & 0xFFFFFFFFu) * m; }
SAE_INLINE F square_root(F v) {
  for (int i = 0; i < L; ++i) v[i] = __builtin_sqrtf(v[i]);
  return v;
}
SAE_INLINE void transpose4(F (&v)[4]) {
  F t[4] = {};
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < L; ++j) t[i][j] = v[j % 4][j / 4 * 4 + i];
  for (int i = 0; i < 4; ++i) v[i] = t[i];
}
SAE_INLINE F load_quads(const float* p, int64_t) { return *(const FUnaligned*)p; }
SAE_INLINE F clamp(F v, float low, float high) {
  v = select(v < low, F{} + low, v);
  return select(v > high, F{} + high, v);
}
SAE_INLINE F reciprocal(F v) { return 1.f / v; }
SAE_INLINE F bf16_to_float(U16 v) { return bits<F>(__builtin_convertvector(v, U) << 16); }
SAE_INLINE U16 narrow(U v) { return __builtin_convertvector(v, U16); }
SAE_INLINE F half_to_float(U16 v) {  // exponent re-based by a multiplication, which also serves denormals
  const U x = __builtin_convertvector(v, U);
  const F magnitude = bits<F>((x & 0x7fffu) << 13) * 0x1p112f;
  const U infinite = bits<U>((x & 0x7c00u) == 0x7c00u) & 0x7f800000u;
  return bits<F>(bits<U>(magnitude) | infinite | (x & 0x8000u) << 16);
}
SAE_INLINE U16 float_to_half(F v) {                           // round to nearest even
  const U x = bits<U>(v), sign = x >> 16 & 0x8000u, a = x & 0x7fffffffu;
  const U normal = (a - 0x38000000u + 0xfffu + (a >> 13 & 1u)) >> 13;
  const U denormal = bits<U>(bits<F>(a) + 0.5f) - 0x3f000000u;
  U r = select(a < 0x38800000u, denormal, normal);
  r = select(a >= 0x477ff000u, U{} + 0x7c00u, r);
  r = select(a > 0x7f800000u, U{} + 0x7e00u, r);
  return narrow(r | sign);
}
#endif
#if SAE_LANES != 16
SAE_INLINE U16 float_to_bf16(F v) {                           // as above
  const U x = bits<U>(v);
  return narrow(select(v != v, U{} + 0x7fc0u, (x + 0x7fffu + (x >> 16 & 1u)) >> 16));
}
#endif

// For Philox: 32-bit numbers in 64-bit lanes, where a product has room. What stands above the lower 32 bits
// does not count.
SAE_INLINE W mul_wide(uint32_t m, W v, W& high) {
  const W product = multiply(m, v);
  high = product >> 32;
  return product;
}

struct F32 {
  typedef float Element;
  static SAE_INLINE F load(const float* p) { return *(const FUnaligned*)p; }
  static SAE_INLINE void store(float* p, F v) { *(FUnaligned*)p = v; }
};
struct BF16 {
  typedef uint16_t Element;
  static SAE_INLINE F load(const uint16_t* p) {
    const U16 v = *(const U16Unaligned*)p;
    return bf16_to_float(v);
  }
  static SAE_INLINE void store(uint16_t* p, F v) {            // round to nearest even; NaN stays NaN
    *(U16Unaligned*)p = float_to_bf16(v);
  }
};
struct F16 {
  typedef uint16_t Element;
  static SAE_INLINE F load(const uint16_t* p) {
    const U16 v = *(const U16Unaligned*)p;
    return half_to_float(v);
  }
  static SAE_INLINE void store(uint16_t* p, F v) { *(U16Unaligned*)p = float_to_half(v); }
};
// The first n lanes, all where n >= L; the others read as 0.
template <class T>
SAE_INLINE F load_some(const typename T::Element* p, int64_t n) {
  if (n >= L) return T::load(p);
  typename T::Element t[L] = {};
  for (int64_t i = 0; i < n; ++i) t[i] = p[i];
  return T::load(t);
}
template <class T>
SAE_INLINE void store_some(typename T::Element* p, F v, int64_t n) {
  if (n >= L) return T::store(p, v);
  typename T::Element t[L];
  T::store(t, v);
  for (int64_t i = 0; i < n; ++i) p[i] = t[i];
}
// body(i, lanes) for the vectors of begin .. end - 1: lanes is L, a constant to the compiler, in all but the
// last one.
template <class Body>
SAE_INLINE void for_lanes(int64_t begin, int64_t end, Body body) {
  int64_t i = begin;
  for (; i + L <= end; i += L) body(i, L);
  if (i < end) body(i, end - i);
}
template <class V>
SAE_INLINE auto sum_lanes(V v) {
  auto s = v[0];
  for (int i = 1; i < L; ++i) s += v[i];
  return s;
}

// 2^(i + f), |f| <= 1/2 and -126 <= i <= 127; the polynomial's relative error is 2e-9. NaN stays NaN,
// whatever i is.
SAE_INLINE F exp2_split(I i, F f) {
  F p = F{} + 1.5478022397e-04f;
  p = fused(p, f, F{} + 1.3400431490e-03f);
  p = fused(p, f, F{} + 9.6179945394e-03f);
  p = fused(p, f, F{} + 5.5503271520e-02f);
  p = fused(p, f, F{} + 2.4022652209e-01f);
  p = fused(p, f, F{} + 6.9314718246e-01f);
  p = fused(p, f, F{} + 1.f);
  return p * bits<F>((i + 127) << 23);
}
constexpr float kRound = 12582912.f;                          // 1.5 * 2^23: x + kRound has no fraction left
SAE_INLINE F exp2_clamped(F x) {                              // 2^x for x <= 127; below -126 it stays 2^-126
  x = select(x < -126.f, F{} - 126.f, x);
  const F t = x + kRound;
  return exp2_split(bits<I>(t) - bits<I>(F{} + kRound), x - (t - kRound));
}
SAE_INLINE F exp_clamped(F x) {                               // e^x for -87 <= x <= 88
  const F log2e = F{} + 1.44269504f, t = fused(x, log2e, F{} + kRound);
  return exp2_split(bits<I>(t) - bits<I>(F{} + kRound),
                    fused(x, F{} + 1.92596299e-08f, fused(x, log2e, kRound - t)));
}
