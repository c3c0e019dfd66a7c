// What the backward makes of the products of one row, whatever they were computed with: p and dx, in place.

namespace flash_attn::cpu::FLASH_ATTN_ISA {

/// x: what softcap_row makes of it, slope = 1 - tanh(scale x / cap)^2.
FLASH_ATTN_INLINE void softcap_slope_row(float* x, float* slope, int64_t n, float scale, float softcap_log2) {
  const float inverse = 1.0f / softcap_log2;
  for (int64_t j = 0; j < n; j += W) {
    const Capped capped = cap_score(load(x + j) * scale, softcap_log2, inverse);
    store(slope + j, 1.0f - capped.t * capped.t);
    store(x + j, capped.score);
  }
}

/// z p over s and p * (z u - delta) over u, where p = 2^(scale s - base) and keep(j, x) is z x for columns [j, j + W).
template <class Keep>
FLASH_ATTN_INLINE void probability_row(float* s, float* u, int64_t n, float scale, float base, float delta,
                                       const Keep& keep) {
  for (int64_t j = 0; j < n; j += W) {
    const vf p = exp2(load(s + j) * scale - base);
    store(s + j, keep(j, p));
    store(u + j, p * (keep(j, load(u + j)) - delta));
  }
}

/// p is at most 1.
FLASH_ATTN_INLINE void limit_row(float* s, int64_t n, float base) {
  for (int64_t j = 0; j < n; j += W) store(s + j, load(s + j) > all(base) ? all(base) : load(s + j));
}

/// Scores, less their base. Of huge ones lse has too few digits left to tell which is the largest, and forward and
/// backward may round products differently: those that may be it count as it, `largest` each. A bias of -1e9 that hides
/// a whole row makes such scores.
FLASH_ATTN_INLINE void huge_row(float* s, int64_t n, float base, float largest) {
  const vf least = all(base - (base < 0 ? -base : base) * 0x1p-20f);
  for (int64_t j = 0; j < n; j += W) store(s + j, load(s + j) > least ? all(largest) : load(s + j) - base);
}

FLASH_ATTN_INLINE void multiply_row(float* x, const float* y, int64_t n) {
  for (int64_t j = 0; j < n; j += W) store(x + j, load(x + j) * load(y + j));
}

/// Columns [lo, hi) of x [0, n) to `to`, `stride` apart: written, or added.
template <bool kAdds>
FLASH_ATTN_INLINE void put_visible(float* to, int64_t stride, const float* x, int64_t n, int64_t lo, int64_t hi) {
  int64_t j = lo < 0 ? 0 : lo;
  if (hi > n) hi = n;
  if (stride == 1)
    for (; j + W <= hi; j += W) store(to + j, kAdds ? load(to + j) + load(x + j) : load(x + j));
  for (; j < hi; ++j) to[j * stride] = kAdds ? to[j * stride] + x[j] : x[j];
}

/// Row r of the task: products with keys [first, first + n), n <= kMost, become z p in s, and dout . v the gradient of
/// them in u.
template <int64_t kMost>
FLASH_ATTN_INLINE void gradient_row(const BackwardTask& t, int64_t r, float* s, float* u, int64_t first, int64_t n,
                                    bool partial) {
  static_assert(kMost % (4 * W) == 0);  // draw_row
  alignas(64) float slope[kMost];
  alignas(64) uint16_t draws[kMost];
  const bool capped = t.softcap_log2 != 0.0f;
  float base = t.base[r];
  const float delta = t.delta[r];
  const int64_t lo = t.lo[r] - first, hi = t.hi[r] - first;
  float scale = t.scale;
  if (capped) softcap_slope_row(s, slope, n, scale, t.softcap_log2), scale = 1.0f;
  scale = add_terms(t, r, s, first, n, scale);
  if (is_huge(base)) {
    scale = scale_row(s, n, scale);
    huge_row(s, n, base, t.largest[r]);
    base = 0.0f;
  } else if (t.bias.row) {
    limit_row(s, n, base);
  }
  if (t.dropout.threshold == 0) {
    probability_row(s, u, n, scale, base, delta, [](int64_t, vf x) { return x; });
  } else {
    draw_row(t.dropout, r, first, n, draws);
    const int32_t threshold = t.dropout.threshold;
    const vf keep_scale = all(t.dropout.scale);
    probability_row(s, u, n, scale, base, delta,
                    [&](int64_t j, vf x) { return x * where_at_least(load_half(draws + j), threshold, keep_scale); });
  }
  if (t.dbias) {
    float* const to = t.dbias[r] + first * t.dbias_stride;
    t.dbias_sums ? put_visible<true>(to, t.dbias_stride, u, n, lo, hi)
                 : put_visible<false>(to, t.dbias_stride, u, n, lo, hi);
  }
  if (capped) multiply_row(u, slope, n);
  if (!partial) return;
  fill_outside(s, n, lo, hi, 0.0f);  // after the exponential: base and u may be NaN, and unseen keys must be 0
  fill_outside(u, n, lo, hi, 0.0f);
}

}  // namespace flash_attn::cpu::FLASH_ATTN_ISA
