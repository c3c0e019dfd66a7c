// The end of the softmax: merging the sums of a row over several runs of keys, then, W rows at a time, sums over lanes
// by a transpose, 1 / l and m ln 2 + ln l.

namespace flash_attn::cpu::FLASH_ATTN_ISA {

/// The sums of the same rows over other keys join those of `to`: m' = max, and o and l of either side are scaled by
/// 2^(m - m').
inline void merge_rows(int64_t rows, int64_t headdim_v, const SoftmaxSums& from, const SoftmaxSums& to) {
  const int64_t ldo = pad_to(headdim_v, W);
  for (int64_t r = 0; r < rows; ++r) {
    const vf here = all(to.m[r]), there = all(from.m[r]);
    const vf now = max(here, there), base = softmax_base(now);
    const vf keep = exp2(here - base), add = exp2(there - base);
    to.m[r] = now[0];
    store(to.l + r * W, load(to.l + r * W) * keep + load(from.l + r * W) * add);
    for (float *o = to.o + r * ldo, *x = from.o + r * ldo, *end = o + ldo; o < end; o += W, x += W)
      store(o, load(o) * keep + load(x) * add);
  }
}

using vd = double __attribute__((vector_size(8 * W)));

/// ln(1 + f) / f on [sqrt(1/2) - 1, sqrt(2) - 1]: degree-9 minimax, relative error 1.1e-7 in fp32, exact at 0.
FLASH_ATTN_INLINE vf log1p_over(vf f) {
  vf p = all(-0x1.382944p-4f);
  p = p * f + 0x1.0849a0p-3f;
  p = p * f - 0x1.0f39e2p-3f;
  p = p * f + 0x1.2271a8p-3f;
  p = p * f - 0x1.542710p-3f;
  p = p * f + 0x1.99a3ecp-3f;
  p = p * f - 0x1.000428p-2f;
  p = p * f + 0x1.555550p-2f;
  p = p * f - 0x1.fffff8p-2f;
  return p * f + 1.0f;
}

/// l (rows, W) by lanes, m (rows) in log2 units -> factor = 1 / sum l, lse = m ln 2 + ln sum l. A row that saw nothing
/// (its sum is 0) gets 0 and -inf.
inline void finish_rows(int64_t rows, const float* m, const float* l, float* factor, float* lse) {
  for (int64_t r = 0; r < rows; r += W) {
    const int64_t count = rows - r < W ? rows - r : W;
    const auto bytes = static_cast<std::size_t>(count) * sizeof(float);
    vf lanes[W];
    for (int i = 0; i < W; ++i) lanes[i] = i < count ? load(l + (r + i) * W) : vf{};
    transpose(lanes);
    vd sum{};
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) sum += __builtin_convertvector(lanes[i], vd);

    // sum = 2^e (1 + f) with 1 + f from sqrt(1/2) to sqrt(2)
    constexpr int32_t kSqrtHalf = 0x3f3504f3;
    const vf rounded = __builtin_convertvector(sum, vf);
    const vi e = (as_int(rounded) - kSqrtHalf) >> 23;
    const vd fraction_of = sum * __builtin_convertvector(as_float((127 - e) << 23), vd);
    const vf f = __builtin_convertvector(fraction_of - 1.0, vf);
    vf max_log2{};
    std::memcpy(&max_log2, m + r, bytes);
    const vd exponent = __builtin_convertvector(max_log2, vd) + __builtin_convertvector(e, vd);
    const vd log_sum = exponent * kLn2 + __builtin_convertvector(f * log1p_over(f), vd);

    const vf zero{}, inverse = __builtin_convertvector(1.0 / sum, vf),
                     finite_lse = __builtin_convertvector(log_sum, vf);
    const vf row_factor = rounded == zero ? zero : inverse;
    const vf row_lse = rounded == zero ? all(-kInfinity) : finite_lse;
    std::memcpy(factor + r, &row_factor, bytes);
    std::memcpy(lse + r, &row_lse, bytes);
  }
}

}  // namespace flash_attn::cpu::FLASH_ATTN_ISA
