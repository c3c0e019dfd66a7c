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

/// Scores outside [lo, hi) become -inf; lo and hi count from the row's first column and may lie outside [0, n).
FLASH_ATTN_INLINE void mask_row(float* s, int64_t n, int64_t lo, int64_t hi) {
  if (lo > n) lo = n;
  if (hi > n) hi = n;
  for (int64_t j = 0; j < lo; ++j) s[j] = -kInfinity;
  for (int64_t j = hi < 0 ? 0 : hi; j < n; ++j) s[j] = -kInfinity;
}

}  // namespace flash_attn::cpu::FLASH_ATTN_ISA
