// Attention of one head on the CPU: O = softmax(Q K^T / 8) V with Q and K turned by RoPE.
// Included by cpu_isa.h.
//
//   forward                                      backward
//     K, V of the head -> fp32, K turned           the same, and dK = dV = 0
//     for each tile of 24 queries:                 for each tile of 24 queries:
//       Q -> fp32, turned, times log2(e) / 8         Q likewise; dO, O -> fp32; delta = rowsum(dO O)
//       S = Q K^T, whole rows of it                  P = 2^(Q K^T - lse)
//       P = 2^(S - max S), l = rowsum P              dS = P (dO V^T - delta)
//       O = P V / l                                  dV += P^T dO;  dK += dS^T Q;  dQ = dS K
//       lse = max S + log2 l                         dQ / 8, turned back
//                                                  dK ln 2, turned back: Q had log2(e) / 8 in it
//
// A head's K and V stay in the L2 cache, and so do a tile's rows of scores: softmax needs one pass and no
// rescaling. With AVX-512, N 261 is padded to 272: K and V are 136 KB, backward's four copies of them (k, kt,
// v, vt) 272 KB, and a tile's scores 26 KB.
//
// All products are one kernel, `product`: C[m,n] = A[m,k] B[k,n] with a register tile of kRows x 2 vectors. A
// is broadcast from memory with any strides, so its transpose costs nothing; B is read by vectors, so K and V
// are also packed by columns (kt, vt) where their transpose is asked for.
//
// Sums are in fp32 always, and so are the factors, except for bf16 tensors where the processor multiplies
// pairs of bf16 (`Pairs`).

constexpr int64_t D = kHeadDim;
constexpr int kRows = SAE_LANES == 16 ? 12 : 6;               // 24 of 32 registers (12 of 16) hold the tile
constexpr int64_t kTile = 24;                                 // queries at a time
constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

inline int64_t round_up(int64_t n, int64_t m) { return (n + m - 1) / m * m; }
// Keys are padded so that both S (whole vectors of keys) and dK, dV (whole groups of kRows keys) fit.
inline int64_t padded(int64_t n) { return round_up(round_up(n, kRows), L); }

// The factors of the products as they are, one to each 32 bits.
struct Singles {
  static constexpr int kDepth = 1;
  static SAE_INLINE F add(F sum, F x, F y) { return fused(x, y, sum); }
  static void along_rows(const float*, int64_t, float*) {}
  static void across_rows(const float*, int64_t, int64_t, float*) {}
};
#ifdef SAE_BF16_PAIRS
// Two neighbours along the sum to each 32 bits, rounded to bf16: half the steps. In place if dst is src.
struct Pairs {
  static constexpr int kDepth = 2;
  static SAE_INLINE F add(F sum, F x, F y) {
    return (F)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)y);
  }
  // (0, 1), (2, 3), ... of n elements, a multiple of 2 L
  static void along_rows(const float* src, int64_t n, float* dst) {
    for (int64_t i = 0; i < n; i += 2 * L)
      *(__m512bh*)(dst + i / 2) =
          _mm512_cvtne2ps_pbh((__m512)*(const F*)(src + i + L), (__m512)*(const F*)(src + i));
  }
  // [rows, width] -> [rows / 2, width], rows 2 r and 2 r + 1 joined; width is a multiple of L
  static void across_rows(const float* src, int64_t rows, int64_t width, float* dst) {
    for (int64_t r = 0; r < rows; r += 2)
      for (int64_t i = 0; i < width; i += L) {
        const F low = *(const F*)(src + r * width + i), high = *(const F*)(src + (r + 1) * width + i);
        const U l = __builtin_convertvector(float_to_bf16(low), U);
        const U h = __builtin_convertvector(float_to_bf16(high), U);
        *(F*)(dst + r / 2 * width + i) = bits<F>(l | h << 16);
      }
  }
};
#else
typedef Singles Pairs;
#endif
inline int64_t steps(int64_t k, int64_t depth) { return round_up(k, depth) / depth; }  // of a sum over k

// C[kRows, V vectors] (+)= A[kRows, k] B[k, V vectors], where element (i, j) of A is a[i * ai + j * aj] and
// vector v of row j of B lies at b + v * bv + j * bj.
template <class Terms, int V, bool kAdd>
SAE_INLINE void tile_product(int64_t k, const float* a, int64_t ai, int64_t aj, const float* b, int64_t bv,
                             int64_t bj, float* c, int64_t ci) {
  F acc[kRows][V];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) acc[i][v] = kAdd ? *(const FUnaligned*)(c + i * ci + v * L) : F{};
  for (int64_t j = 0; j < k; ++j, a += aj, b += bj) {
    F row[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) row[v] = *(const FUnaligned*)(b + v * bv);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const F x = broadcast(a + i * ai);
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) acc[i][v] = Terms::add(acc[i][v], x, row[v]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) *(FUnaligned*)(c + i * ci + v * L) = acc[i][v];
}
// C[m,n] (+)= A[m,k] B[k,n], with strides and k in units of 32 bits; m and n are rounded up to whole tiles,
// which every buffer has room for.
// A function of its own, so that all registers are the tile's.
template <class Terms, bool kAdd>
__attribute__((noinline)) void product(int64_t m, int64_t n, int64_t k, const float* a, int64_t ai,
                                       int64_t aj, const float* b, int64_t bv, int64_t bj, float* c,
                                       int64_t ci) {
  for (int64_t v = 0; v < n; v += 2 * L)
    for (int64_t i = 0; i < m; i += kRows) {
      if (v + L < n)
        tile_product<Terms, 2, kAdd>(k, a + i * ai, ai, aj, b + v / L * bv, bv, bj, c + i * ci + v, ci);
      else
        tile_product<Terms, 1, kAdd>(k, a + i * ai, ai, aj, b + v / L * bv, bv, bj, c + i * ci + v, ci);
    }
}

struct Rows {  // the rows of one head: token t at offset + t * stride, in elements
  int64_t offset, stride;
};
inline Rows qkv_rows(const Attention& a, int64_t task, int which) {  // [B,N,3,H,D]
  return {(task / a.H * a.N * 3 + which) * a.H * D + task % a.H * D, 3 * a.H * D};
}
inline Rows out_rows(const Attention& a, int64_t task) {      // [B,N,H,D]
  return {task / a.H * a.N * a.H * D + task % a.H * D, a.H * D};
}

// (x[i], x[i + 32]) turns by the angle of the token, or by minus it.
SAE_INLINE void turn(F& x, F& y, const float* angle, int i, float direction) {
  const F c = *(const FUnaligned*)(angle + i), s = direction * *(const FUnaligned*)(angle + D / 2 + i);
  const F t = fused(x, c, -(y * s));
  y = fused(y, c, x * s);
  x = t;
}
// rows [first, first + n) -> dst [n, D], turned when angles is given, times scale; zeros up to row `end`.
template <class T>
inline void load_rows(const typename T::Element* src, Rows r, int64_t first, int64_t n, int64_t end,
                      const float* angles, int64_t prefix, float scale, float* dst) {
  for (int64_t t = 0; t < n; ++t, dst += D) {
    const typename T::Element* p = src + r.offset + (first + t) * r.stride;
    const bool turned = angles && first + t >= prefix;
    for (int i = 0; i < D / 2; i += L) {
      F x = T::load(p + i), y = T::load(p + D / 2 + i);
      if (turned) turn(x, y, angles + (first + t - prefix) * D, i, 1.f);
      *(F*)(dst + i) = x * scale;
      *(F*)(dst + D / 2 + i) = y * scale;
    }
  }
  for (int64_t i = 0; i < (end - n) * D; i += L) *(F*)(dst + i) = F{};
}
template <class T>
inline void store_rows(const float* src, int64_t n, const float* angles, int64_t prefix, float scale,
                       typename T::Element* dst, Rows r, int64_t first) {
  for (int64_t t = 0; t < n; ++t, src += D) {
    typename T::Element* p = dst + r.offset + (first + t) * r.stride;
    for (int i = 0; i < D / 2; i += L) {
      F x = *(const F*)(src + i), y = *(const F*)(src + D / 2 + i);
      if (angles && first + t >= prefix) turn(x, y, angles + (first + t - prefix) * D, i, -1.f);
      T::store(p + i, x * scale);
      T::store(p + D / 2 + i, y * scale);
    }
  }
}
// [n, D] -> panels [n / L][D][L]: L keys side by side.
inline void pack_columns(const float* src, int64_t n, float* dst) {
  for (int64_t p = 0; p < n; p += L)
    for (int64_t d = 0; d < D; d += 4) {
      F v[4];
      for (int j = 0; j < 4; ++j) v[j] = load_quads(src + (p + j) * D + d, 4 * D);  // keys j, j + 4, ...
      transpose4(v);
      for (int j = 0; j < 4; ++j) *(F*)(dst + p * D + (d + j) * L) = v[j];
    }
}

struct Scratch {                                              // hands out 64-byte aligned pieces
  float* p;
  float* take(int64_t n) {
    float* r = p;
    p += round_up(n, 16);
    return r;
  }
};
inline size_t attention_scratch(const Attention& a, bool backward) {
  const int64_t n = padded(a.N), heads = n * D + 16, tiles = kTile * (D + 16), scores = kTile * n + 16;
  return backward ? 6 * heads + 6 * tiles + 3 * scores : 3 * heads + 2 * tiles + scores;
}

template <class T, class Terms>
inline void forward(const Attention& a, int64_t task, const float* angles, float* scratch) {
  typedef typename T::Element E;
  const E* const qkv = static_cast<const E*>(a.qkv);
  E* const out = static_cast<E*>(a.out);
  float* const lse = a.lse + task * a.N;
  const int64_t N = a.N, n = padded(N), prefix = a.prefix;
  constexpr int64_t depth = Terms::kDepth, d = D / depth;     // steps of a sum over D

  Scratch s{scratch};
  float *k = s.take(n * D), *kt = s.take(n * D), *v = s.take(n * D);
  float *q = s.take(kTile * D), *o = s.take(kTile * D), *p = s.take(kTile * n);
  load_rows<T>(qkv, qkv_rows(a, task, 1), 0, N, n, angles, prefix, 1.f, k);
  load_rows<T>(qkv, qkv_rows(a, task, 2), 0, N, n, nullptr, 0, 1.f, v);
  pack_columns(k, n, kt);
  Terms::across_rows(kt, n / L * D, L, kt);
  Terms::across_rows(v, n, D, v);

  for (int64_t first = 0; first < N; first += kTile) {
    const int64_t rows = N - first < kTile ? N - first : kTile;
    load_rows<T>(qkv, qkv_rows(a, task, 0), first, rows, kTile, angles, prefix, 0.125f * kLog2e, q);
    Terms::along_rows(q, kTile * D, q);
    product<Terms, false>(rows, n, d, q, d, 1, kt, d * L, L, p, n);  // S, in units of log 2

    float inverse[kTile];                                     // 1 / l
    for (int64_t r = 0; r < rows; ++r) {
      float* row = p + r * n;
      for (int64_t i = N; i < n; ++i) row[i] = -INFINITY;
      F m = *(F*)row, sum = {};
      for (int64_t i = L; i < n; i += L) m = select(m > *(F*)(row + i), m, *(F*)(row + i));
      float top = m[0];
      for (int i = 1; i < L; ++i) top = top > m[i] ? top : m[i];
      for (int64_t i = 0; i < n; i += L) {
        const F e = exp2_clamped(*(F*)(row + i) - top);
        *(F*)(row + i) = e;
        sum += e;
      }
      const float total = sum_lanes(sum);
      lse[first + r] = top + std::log2(total);
      inverse[r] = 1.f / total;
    }

    Terms::along_rows(p, kTile * n, p);
    product<Terms, false>(rows, D, steps(N, depth), p, n / depth, 1, v, L, D, o, D);  // P V
    for (int64_t r = 0; r < rows; ++r)
      for (int i = 0; i < D; i += L) *(F*)(o + r * D + i) *= inverse[r];
    store_rows<T>(o, rows, nullptr, 0, 1.f, out, out_rows(a, task), first);
  }
}

template <class T, class Terms>
inline void backward(const Attention& a, int64_t task, const float* angles, float* scratch) {
  typedef typename T::Element E;
  const E *const qkv = static_cast<const E*>(a.qkv), *const dout = static_cast<const E*>(a.dout);
  const E* const out = static_cast<const E*>(a.out);
  E* const dqkv = static_cast<E*>(a.dqkv);
  const float* const lse = a.lse + task * a.N;
  const int64_t N = a.N, n = padded(N), prefix = a.prefix;
  const Rows rows_o = out_rows(a, task);
  constexpr int64_t depth = Terms::kDepth, d = D / depth;     // steps of a sum over D

  Scratch s{scratch};
  float *k = s.take(n * D), *kt = s.take(n * D), *v = s.take(n * D), *vt = s.take(n * D);
  float *dk = s.take(n * D), *dv = s.take(n * D);
  float *q = s.take(kTile * D), *g = s.take(kTile * D), *o = s.take(kTile * D), *dq = s.take(kTile * D);
  float *p = s.take(kTile * n), *dp = s.take(kTile * n);
  // Q, dO and dS are summed over along their rows and across them: as pairs each needs two forms.
  constexpr bool two = depth == 2;
  float* q_across = two ? s.take(kTile * D) : q;
  float* g_across = two ? s.take(kTile * D) : g;
  float* ds_across = two ? s.take(kTile * n) : dp;

  load_rows<T>(qkv, qkv_rows(a, task, 1), 0, N, n, angles, prefix, 1.f, k);
  load_rows<T>(qkv, qkv_rows(a, task, 2), 0, N, n, nullptr, 0, 1.f, v);
  pack_columns(k, n, kt);
  pack_columns(v, n, vt);
  Terms::across_rows(kt, n / L * D, L, kt);
  Terms::across_rows(vt, n / L * D, L, vt);
  Terms::across_rows(k, n, D, k);
  for (int64_t i = 0; i < n * D; i += L) *(F*)(dk + i) = *(F*)(dv + i) = F{};

  for (int64_t first = 0; first < N; first += kTile) {
    const int64_t rows = N - first < kTile ? N - first : kTile;
    load_rows<T>(qkv, qkv_rows(a, task, 0), first, rows, kTile, angles, prefix, 0.125f * kLog2e, q);
    load_rows<T>(dout, rows_o, first, rows, kTile, nullptr, 0, 1.f, g);
    load_rows<T>(out, rows_o, first, rows, kTile, nullptr, 0, 1.f, o);
    float delta[kTile];
    for (int64_t r = 0; r < rows; ++r) {
      F dot = {};
      for (int i = 0; i < D; i += L) dot = fused(*(F*)(g + r * D + i), *(F*)(o + r * D + i), dot);
      delta[r] = sum_lanes(dot);
    }

    Terms::across_rows(q, kTile, D, q_across);
    Terms::across_rows(g, kTile, D, g_across);
    Terms::along_rows(q, kTile * D, q);
    Terms::along_rows(g, kTile * D, g);
    product<Terms, false>(rows, n, d, q, d, 1, kt, d * L, L, p, n);  // S
    product<Terms, false>(rows, n, d, g, d, 1, vt, d * L, L, dp, n);  // dP
    for (int64_t r = 0; r < rows; ++r) {
      const float shift = lse[first + r];
      for (int64_t i = 0; i < n; i += L) {
        F* const pi = (F*)(p + r * n + i);
        F* const di = (F*)(dp + r * n + i);
        *pi = exp2_clamped(*pi - shift);
        *di = *pi * (*di - delta[r]);                         // dP becomes dS
      }
      for (int64_t i = N; i < round_up(N, depth); ++i) dp[r * n + i] = 0.f;  // the last pair's other half
    }

    Terms::across_rows(p, kTile, n, p);  // a row past the last one meets zeros of Q and dO
    Terms::across_rows(dp, kTile, n, ds_across);
    Terms::along_rows(dp, kTile * n, dp);
    product<Terms, true>(N, D, steps(rows, depth), p, 1, n, g_across, L, D, dv, D);
    product<Terms, true>(N, D, steps(rows, depth), ds_across, 1, n, q_across, L, D, dk, D);
    product<Terms, false>(rows, D, steps(N, depth), dp, n / depth, 1, k, L, D, dq, D);
    store_rows<T>(dq, rows, angles, prefix, 0.125f, dqkv, qkv_rows(a, task, 0), first);
  }

  store_rows<T>(dk, N, angles, prefix, kLn2, dqkv, qkv_rows(a, task, 1), 0);  // Q came with log2(e) / 8 in it
  store_rows<T>(dv, N, nullptr, 0, 1.f, dqkv, qkv_rows(a, task, 2), 0);
}

inline void attention_forward(const Attention& a, int64_t task, const float* angles, float* scratch) {
  if (a.type == Type::f32) return forward<F32, Singles>(a, task, angles, scratch);
  if (a.type == Type::bf16) return forward<BF16, Pairs>(a, task, angles, scratch);
  forward<F16, Singles>(a, task, angles, scratch);
}
inline void attention_backward(const Attention& a, int64_t task, const float* angles, float* scratch) {
  if (a.type == Type::f32) return backward<F32, Singles>(a, task, angles, scratch);
  if (a.type == Type::bf16) return backward<BF16, Pairs>(a, task, angles, scratch);
  backward<F16, Singles>(a, task, angles, scratch);
}
