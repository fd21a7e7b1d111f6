// Standard normal numbers from a counter: element e of stream `seed` depends on (seed, e) and on nothing
// else, so it is the same on CPU and GPU, at any thread count, in forward and in backward, and after a
// resume.
//
//   block b = e / 4, counter (b lo, b hi, 0, 0), key (seed lo, seed hi) -> Philox 4x32-10 -> four words x
//   u = (x + 1/2) / 2^32;  Box-Muller on the words (0, 1) and (2, 3):  sqrt(-2 ln u0) (cos, sin)(2 pi u1)
//
// Philox: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
//
// One source for scalars (CUDA) and vectors (CPU): U is 32 bits unsigned, I signed, F float. Every operation
// below rounds as IEEE says and every fused multiply-add is written out, so both give the same bits. ln, sin
// and cos are minimax polynomials of ours (Remez); against float64 the normals are off by a few ulp
// everywhere, also where ln u -> 0.
//
// Included inside a namespace that defines bits, select, to_float, fused, square_root and mul_wide for these.

#ifdef __CUDACC__
#define SAE_UNROLL _Pragma("unroll")
#else
#define SAE_UNROLL _Pragma("GCC unroll 10")
#endif

struct PhiloxKey {
  uint32_t lo, hi;
};

// The counters of n blocks -> their four words each. mul_wide(m, x, high) returns the low 32 bits of m x and
// sets the high ones. A block is one long chain of products: several at a time, round by round, keep a
// processor busy.
template <int n, class U>
SAE_INLINE void philox(U (&c)[n][4], PhiloxKey key) {
  SAE_UNROLL
  for (int round = 0; round < 10; ++round) {
    U low[n][2], high[n][2];
    SAE_UNROLL
    for (int i = 0; i < n; ++i) {
      low[i][0] = mul_wide(0xD2511F53u, c[i][0], high[i][0]);
      low[i][1] = mul_wide(0xCD9E8D57u, c[i][2], high[i][1]);
    }
    SAE_UNROLL
    for (int i = 0; i < n; ++i) {
      c[i][0] = high[i][1] ^ c[i][1] ^ key.lo;
      c[i][1] = low[i][1];
      c[i][2] = high[i][0] ^ c[i][3] ^ key.hi;
      c[i][3] = low[i][0];
    }
    key.lo += 0x9E3779B9u;
    key.hi += 0xBB67AE85u;
  }
}

// -2 ln((x + 1/2) / 2^32) >= 0. The upper half goes through w = 1 - u, which is exact where u rounds to 1.
template <class F, class I, class U>
SAE_INLINE F minus_two_log(U x) {
  const I top = bits<I>(x) < 0;                               // x >= 2^31: all ones (vector) or 1 (scalar)
  const F w = fused(to_float(bits<I>(select(top, ~x, x))), F{} + 0x1p-32f, F{} + 0x1p-33f);
  const F u = select(top, 1.f - w, w);
  // u = 2^e m, m in [sqrt(1/2), sqrt(2)); f = m - 1
  const I e = (bits<I>(u) - 0x3f3504f3) >> 23;
  const F m = bits<F>(bits<I>(u) - (e << 23));
  const F f = select(e == 0, -w, m - 1.f), ff = f * f;
  F p = F{} - 7.6344951987e-02f;                              // ln(1 + f) = f - f^2/2 + f^3 p(f)
  p = fused(p, f, F{} + 1.2761574984e-01f);
  p = fused(p, f, F{} - 1.3160182536e-01f);
  p = fused(p, f, F{} + 1.4201758802e-01f);
  p = fused(p, f, F{} - 1.6623356938e-01f);
  p = fused(p, f, F{} + 2.0001226664e-01f);
  p = fused(p, f, F{} - 2.5000819564e-01f);
  p = fused(p, f, F{} + 3.3333331347e-01f);
  const F n = to_float(e);
  // ln 2 = 0.693359375 - 2.1219444e-4; n * 0.693359375 is exact
  F small = fused(n, F{} - 2.1219444e-04f, p * (f * ff));
  small = fused(ff, F{} - 0.5f, small);
  return -2.f * fused(n, F{} + 0.693359375f, f + small);
}

// cos and sin of 2 pi (x + 1/2) / 2^32: the two upper bits (rounded) are the quadrant, the rest is
// t in [-1/2, 1/2) quarter turns.
template <class F, class I, class U>
SAE_INLINE void cos_sin_turns(U x, F& cosine, F& sine) {
  const U quadrant = (x + 0x20000000u) >> 30;
  const F t = to_float(bits<I>((x << 2) + 2u)) * 0x1p-32f, tt = t * t;
  F s = fused(tt, F{} - 4.6021770686e-03f, F{} + 7.9680226743e-02f);
  s = fused(s, tt, F{} - 6.4596349001e-01f);
  s = fused(s, tt, F{} + 1.5707963705e+00f) * t;
  F c = fused(tt, F{} + 9.0363167692e-04f, F{} - 2.0860072225e-02f);
  c = fused(c, tt, F{} + 2.5366920233e-01f);
  c = fused(c, tt, F{} - 1.2337005138e+00f);
  c = fused(c, tt, F{} + 1.f);
  const I odd = (bits<I>(quadrant) & 1) != 0;
  const U sign_c = ((quadrant + 1u) & 2u) << 30, sign_s = (quadrant & 2u) << 30;
  cosine = bits<F>(bits<U>(select(odd, s, c)) ^ sign_c);
  sine = bits<F>(bits<U>(select(odd, c, s)) ^ sign_s);
}

// The four words of a block -> its four normals.
template <class F, class I, class U>
SAE_INLINE void normals(const U (&x)[4], F (&eps)[4]) {
  SAE_UNROLL
  for (int i = 0; i < 4; i += 2) {
    const F r = square_root(minus_two_log<F, I>(x[i]));
    F c, s;
    cos_sin_turns<F, I>(x[i + 1], c, s);
    eps[i] = r * c;
    eps[i + 1] = r * s;
  }
}
