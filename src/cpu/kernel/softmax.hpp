// The online softmax (Milakov & Gimelshein 2018), in whatever precision the caller stores p.
//
// Two steps: first all rows of a score tile raise their maxima, then each takes its exponentials. A row's exponentials
// would otherwise wait for a reduction across its lanes and a 2^t, about 60 cycles; and W rows together reduce by a
// transpose and share one 2^t.
//
// Per vector of scores: a load and a maximum; then one multiply-add, 2^t (10 operations), one addition, and emit.

namespace flash_attn::cpu::FLASH_ATTN_ISA {

/// What scores are relative to. Nothing seen yet: 2^(-inf - 0) = 0, never -inf + inf.
FLASH_ATTN_INLINE vf softmax_base(vf m) { return m == all(-kInfinity) ? vf{} : m; }

/// The maxima of n scores (whole vectors), lane by lane.
FLASH_ATTN_INLINE vf max_by_lanes(const float* s, int64_t n) {
  vf m[4];
  for (vf& x : m) x = load(s);
  int64_t j = 0;
  for (; j + 7 * W < n; j += 8 * W)
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) m[i % 4] = max(m[i % 4], load(s + j + i * W));
  for (; j < n; j += W) m[0] = max(m[0], load(s + j));
  return max(max(m[0], m[1]), max(m[2], m[3]));
}

/// Raises the maxima m (rows) by scale times the rows' n scores. base (rows): what exponentials are relative to;
/// rescale (rows): the factor for what was summed before.
FLASH_ATTN_INLINE void raise_maxima(const float* s, int64_t lds, int64_t rows, int64_t n, float scale, float* m,
                                    float* base, float* rescale) {
  for (int64_t r = 0; r < rows; r += W) {
    const int64_t count = rows - r < W ? rows - r : W;
    const auto bytes = static_cast<std::size_t>(count) * sizeof(float);
    vf top[W];
    for (int i = 0; i < W; ++i) top[i] = i < count ? max_by_lanes(s + (r + i) * lds, n) : all(-kInfinity);
    const vf highest = reduce_each(top, max);

    vf before = all(-kInfinity);
    std::memcpy(&before, m + r, bytes);
    const vf now = max(highest * scale, before), relative_to = softmax_base(now), factor = exp2(before - relative_to);
    std::memcpy(m + r, &now, bytes);
    std::memcpy(base + r, &relative_to, bytes);
    std::memcpy(rescale + r, &factor, bytes);
  }
}

FLASH_ATTN_INLINE bool is_huge(float base) { return base >= kHugeScore || base <= -kHugeScore; }

/// scale s over s [0, n), rounded by itself as maxima are: none is above the base then. Returns the scale left to
/// apply.
__attribute__((noinline)) inline float scale_row(float* s, int64_t n, float scale) {
  for (int64_t j = 0; j < n; j += W) store(s + j, load(s + j) * scale);
  return 1.0f;
}

/// p = 2^(scale s - base): emit(j, p, p') takes the two vectors from column j, emit(j, p) a last odd one.
/// l = rescale l + sum p.
template <class Emit>
FLASH_ATTN_INLINE void exponentials(const float* s, int64_t n, float scale, float base, float rescale, float* l,
                                    const Emit& emit) {
  vf sum0{}, sum1{}, sum2{}, sum3{};
  int64_t j = 0;
  for (; j + 3 * W < n; j += 4 * W) {
    const vf p0 = exp2(load(s + j) * scale - base), p1 = exp2(load(s + j + W) * scale - base);
    const vf p2 = exp2(load(s + j + 2 * W) * scale - base), p3 = exp2(load(s + j + 3 * W) * scale - base);
    emit(j, p0, p1), emit(j + 2 * W, p2, p3);
    sum0 += p0, sum1 += p1, sum2 += p2, sum3 += p3;
  }
  for (; j + W < n; j += 2 * W) {
    const vf p0 = exp2(load(s + j) * scale - base), p1 = exp2(load(s + j + W) * scale - base);
    emit(j, p0, p1);
    sum0 += p0, sum1 += p1;
  }
  if constexpr (requires { emit(j, sum0); }) {
    if (j < n) {
      const vf p = exp2(load(s + j) * scale - base);
      emit(j, p);
      sum0 += p;
    }
  }
  store(l, load(l) * rescale + ((sum0 + sum1) + (sum2 + sum3)));
}

}  // namespace flash_attn::cpu::FLASH_ATTN_ISA
