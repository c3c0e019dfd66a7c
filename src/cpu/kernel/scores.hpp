// From raw products to scores, in place, for one row: softcap, ALiBi, bias, mask. Shared by forward and backward.

namespace flash_attn::cpu::FLASH_ATTN_ISA {

inline constexpr float kInfinity = __builtin_inff();

/// A score under a cap (log2 units), and t = tanh(score / cap). Far below the cap t is that ratio, and the score stays
/// what it is: with a cap of 2e38 the ratio of most scores would be denormal, of few digits.
struct Capped {
  vf score, t;
};
FLASH_ATTN_INLINE Capped cap_score(vf score, float cap, float inverse_cap) {
  const vf ratio = score * inverse_cap, t = tanh(ratio);
  return {abs(ratio) < all(0x1p-13f) ? score : t * cap, t};  // 1 - t^2 / 3 is 1 there
}
/// s[0, n) are the raw products of keys [first, first + n), n a multiple of W.
FLASH_ATTN_INLINE void softcap_row(float* s, int64_t n, float scale, float softcap_log2) {
  const float inverse = 1.0f / softcap_log2;
  for (int64_t j = 0; j < n; j += W) store(s + j, cap_score(load(s + j) * scale, softcap_log2, inverse).score);
}

/// scale s - slope |position - key|: the distance is exact in fp32 below 2^24.
FLASH_ATTN_INLINE void alibi_row(float* s, int64_t n, float scale, float slope_log2, int64_t distance_to_first) {
  const vf lanes = iota();
  for (int64_t j = 0; j < n; j += W)
    store(s + j, load(s + j) * scale - abs(static_cast<float>(distance_to_first - j) - lanes) * slope_log2);
}

/// b log2(e). A finite b stays finite: masks are often the lowest finite number, and -inf would hide what they do not.
FLASH_ATTN_INLINE vf bias_log2(vf b) {
  const vf x = b * static_cast<float>(kLog2e), most = all(__FLT_MAX__);
  const vf not_above = x > most ? most : x, bounded = not_above < -most ? -most : not_above;
  return abs(b) == all(kInfinity) ? b : bounded;
}

/// scale s + bias; its row r has a value for keys [0, bias.cols), and there is nothing to read beyond.
__attribute__((noinline)) inline void bias_row(float* s, int64_t n, float scale, const RowList& bias, int64_t r,
                                               int64_t first) {
  with_loader(bias, [&](const auto& load_columns) {
    for (int64_t j = 0; j < n; j += W) store(s + j, load(s + j) * scale + bias_log2(load_columns(bias, r, first + j)));
  });
}

/// Asks memory for the bias of rows [r, r + rows) and keys [first, last), which the products before it leave time for.
FLASH_ATTN_INLINE void prefetch_bias(const RowList& bias, int64_t r, int64_t rows, int64_t first, int64_t last) {
  if (!bias.row || bias.stride_col != 1) return;
  const int64_t size = bytes_of(bias.dtype);
  for (int64_t i = r; i < r + rows; ++i)
    for (int64_t at = first * size; at < last * size; at += 64) __builtin_prefetch(bias.row[i] + at);
}

/// What row r of a task adds to scale s, s[0, n) being of keys [first, first + n). Returns the scale left to apply.
template <class Task>
FLASH_ATTN_INLINE float add_terms(const Task& t, int64_t r, float* s, int64_t first, int64_t n, float scale) {
  if (t.slope_log2) alibi_row(s, n, scale, t.slope_log2[r], t.position[r] - first), scale = 1.0f;
  if (t.bias.row) bias_row(s, n, scale, t.bias, r, first), scale = 1.0f;
  return scale;
}

/// Columns outside [lo, hi) become `value`; lo and hi count from the row's first column and may lie outside [0, n).
FLASH_ATTN_INLINE void fill_outside(float* s, int64_t n, int64_t lo, int64_t hi, float value) {
  if (lo > n) lo = n;
  for (int64_t j = 0; j < lo; ++j) s[j] = value;
  for (int64_t j = hi < 0 ? 0 : hi; j < n; ++j) s[j] = value;
}

/// All of it for row r of a forward task, s[0, n) being its products with keys [first, first + n). Returns the scale
/// that is left to apply.
FLASH_ATTN_INLINE float score_row(const AttendTask& t, int64_t r, float* s, int64_t first, int64_t n, bool partial) {
  float scale = t.scale;
  if (t.softcap_log2 != 0.0f) softcap_row(s, n, scale, t.softcap_log2), scale = 1.0f;
  scale = add_terms(t, r, s, first, n, scale);
  if (partial) fill_outside(s, n, t.lo[r] - first, t.hi[r] - first, -kInfinity);
  return scale;
}

/// What the rows of a score tile see of the keys [block, block_end): computes [first, last) (multiples of kFront and
/// kBack), and whether that holds keys that some row does not see. Rows may come from several heads: no order of lo and
/// hi is assumed.
struct Seen {
  int64_t first, last;
  bool partial;
};

template <int64_t kFront, int64_t kBack>
FLASH_ATTN_INLINE Seen seen_by(const int64_t* lo, const int64_t* hi, int64_t rows, int64_t block, int64_t block_end) {
  int64_t any_lo = block_end, any_hi = block, all_lo = block, all_hi = block_end;
  for (int64_t r = 0; r < rows; ++r) {
    if (hi[r] > lo[r]) {
      any_lo = lo[r] < any_lo ? lo[r] : any_lo;
      any_hi = hi[r] > any_hi ? hi[r] : any_hi;
    }
    all_lo = lo[r] > all_lo ? lo[r] : all_lo;
    all_hi = hi[r] < all_hi ? hi[r] : all_hi;
  }
  const int64_t first = (any_lo > block ? any_lo : block) / kFront * kFront;
  const int64_t last = ((any_hi < block_end ? any_hi : block_end) + kBack - 1) / kBack * kBack;
  return {first, last, all_lo > first || all_hi < last};
}

/// Whether a panel of [first, last) has an inf or a NaN. 0 * inf is NaN: what a row does not see must then not be
/// multiplied at all, and partial tiles go row by row.
FLASH_ATTN_INLINE bool any_special(const uint8_t* special, int64_t first, int64_t last) {
  for (int64_t j = first / kPanel; j * kPanel < last; ++j)
    if (special[j]) return true;
  return false;
}

}  // namespace flash_attn::cpu::FLASH_ATTN_ISA
