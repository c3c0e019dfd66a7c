// From raw products to scores, in place, for one row: softcap, ALiBi, mask. Shared by forward and backward.

namespace flash_attn::cpu::FLASH_ATTN_ISA {

inline constexpr float kInfinity = __builtin_inff();

/// s[0, n) are the raw products of keys [first, first + n), n a multiple of W.
FLASH_ATTN_INLINE void softcap_row(float* s, int64_t n, float softcap_log2) {
  for (int64_t j = 0; j < n; j += W) store(s + j, tanh(load(s + j)) * softcap_log2);
}

/// - slope |position - key|: exact in fp32 for distances below 2^24.
FLASH_ATTN_INLINE void alibi_row(float* s, int64_t n, float slope_log2, int64_t distance_to_first) {
  const vf lanes = iota();
  for (int64_t j = 0; j < n; j += W)
    store(s + j, load(s + j) - abs(static_cast<float>(distance_to_first - j) - lanes) * slope_log2);
}

/// Columns outside [lo, hi) become `value`; lo and hi count from the row's first column and may lie outside [0, n).
FLASH_ATTN_INLINE void fill_outside(float* s, int64_t n, int64_t lo, int64_t hi, float value) {
  if (lo > n) lo = n;
  for (int64_t j = 0; j < lo; ++j) s[j] = value;
  for (int64_t j = hi < 0 ? 0 : hi; j < n; ++j) s[j] = value;
}

/// What a group of rows sees of the keys [block, block_end): computes [first, last) (whole panels in front, whole
/// vectors behind), and whether that holds keys that some row does not see. Rows may come from several heads: no order
/// of lo and hi is assumed.
struct Seen {
  int64_t first, last;
  bool partial;
};

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
  const int64_t first = (any_lo > block ? any_lo : block) / kPanel * kPanel;
  const int64_t last = ((any_hi < block_end ? any_hi : block_end) + W - 1) / W * W;
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
