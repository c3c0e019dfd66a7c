// The online softmax (Milakov & Gimelshein 2018), in whatever precision the caller stores p.
//
// Two steps a row: first all rows of a group raise their maxima, then all take exponentials. A row's second step waits
// for the end of its first (a reduction across lanes and a 2^t, about 60 cycles); with the rows of the group in
// between, it never does.
//
// Per vector of scores: a load and a maximum; then one multiply-add, 2^t (10 operations), one addition, and emit.

namespace flash_attn::cpu::FLASH_ATTN_ISA {

/// What scores are relative to. Nothing seen yet: 2^(-inf - 0) = 0, never -inf + inf.
FLASH_ATTN_INLINE float softmax_base(float m) { return m == -kInfinity ? 0.0f : m; }

/// Raises the row's maximum m by its n scores (whole vectors) times scale; returns the factor for what was summed
/// before.
FLASH_ATTN_INLINE float raise_max(const float* s, int64_t n, float scale, float& m) {
  vf m0 = load(s), m1 = m0;
  int64_t j = W;
  for (; j + W < n; j += 2 * W) m0 = max(m0, load(s + j)), m1 = max(m1, load(s + j + W));
  if (j < n) m0 = max(m0, load(s + j));
  const float row_max = max_lanes(max(m0, m1)) * scale, before = m;
  if (row_max > m) m = row_max;
  return exp2(all(before - softmax_base(m)))[0];
}

/// p = 2^(scale s - m): emit(j, p, p') takes the two vectors from column j, emit(j, p) a last odd one.
/// l = rescale l + sum p.
template <class Emit>
FLASH_ATTN_INLINE void exponentials(const float* s, int64_t n, float scale, float m, float rescale, float* l,
                                    const Emit& emit) {
  const float base = softmax_base(m);
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
