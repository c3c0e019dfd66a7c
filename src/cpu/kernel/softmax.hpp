// One row of the online softmax (Milakov & Gimelshein 2018), in whatever precision the caller stores p.
//
// Per vector of scores: a load and a maximum; then one multiply-add, 2^t (10 operations), one addition, and emit.

namespace flash_attn::cpu::FLASH_ATTN_ISA {

/// p = 2^(scale s - m') for the row's n scores (whole vectors), m' the maximum so far: emit(j, p, p') takes the two
/// vectors from column j, emit(j, p) a last odd one. Updates m and l; returns the factor for what was summed before.
template <class Emit>
FLASH_ATTN_INLINE float softmax_row(const float* s, int64_t n, float scale, float& m, float* l, const Emit& emit) {
  vf m0 = load(s), m1 = m0;
  int64_t j = W;
  for (; j + W < n; j += 2 * W) m0 = max(m0, load(s + j)), m1 = max(m1, load(s + j + W));
  if (j < n) m0 = max(m0, load(s + j));
  const float row_max = max_lanes(max(m0, m1)) * scale;
  const float m_new = row_max > m ? row_max : m;
  const float base = m_new == -kInfinity ? 0.0f : m_new;  // nothing seen yet: 2^(-inf - 0) = 0, never -inf + inf
  vf sum0{}, sum1{}, sum2{}, sum3{};
  for (j = 0; j + 3 * W < n; j += 4 * W) {
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
  const float rescale = exp2(all(m - base))[0];
  store(l, load(l) * rescale + ((sum0 + sum1) + (sum2 + sum3)));
  m = m_new;
  return rescale;
}

}  // namespace flash_attn::cpu::FLASH_ATTN_ISA
