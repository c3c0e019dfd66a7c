// The forward: online softmax over key blocks (Milakov & Gimelshein 2018; Dao et al. 2022, algorithm 1; 2023, eq. 5).
//
//   for a block of keys (its K and V panels stay in L2):
//     for a group of rows (its scores stay in L1):
//       s = q k^T                          2 d FLOPs a score, register tiles
//       m' = max(m, max s); p = 2^(s - m'); l = l 2^(m - m') + sum p
//       o = o 2^(m - m') + p v             2 d FLOPs a score, register tiles; the scaling rides on loading o
//
// Cycles for W scores, at one W-wide FMA a cycle: 2 d for the products; about 12 for max, exp2 and sum; reading and
// writing o costs 2 d / block. Ceiling at d = 64: 128 / (128 + 12 + 1) = 91 %; at d = 128: 95 %.

namespace flash_attn::cpu::FLASH_ATTN_ISA {

inline constexpr int64_t kGroup = 12;  // 12 x 400 floats: 19 KB of L1
inline constexpr int64_t kBlock = W == 16 ? 384 : 256;

/// Softmax of one row of scores in place: returns the factor for the row's old sum.
FLASH_ATTN_INLINE float softmax_row(float* s, int64_t n, float& m, float* l) {
  vf m0 = load(s), m1 = m0;
  int64_t j = W;
  for (; j + W < n; j += 2 * W) m0 = max(m0, load(s + j)), m1 = max(m1, load(s + j + W));
  if (j < n) m0 = max(m0, load(s + j));
  const float row_max = max_lanes(max(m0, m1));
  const float m_new = row_max > m ? row_max : m;
  const float base = m_new == -kInfinity ? 0.0f : m_new;  // nothing seen yet: 2^(-inf - 0) = 0, never -inf + inf
  vf sum0{}, sum1{}, sum2{}, sum3{};
  for (j = 0; j + 3 * W < n; j += 4 * W) {
    const vf p0 = exp2(load(s + j) - base), p1 = exp2(load(s + j + W) - base);
    const vf p2 = exp2(load(s + j + 2 * W) - base), p3 = exp2(load(s + j + 3 * W) - base);
    store(s + j, p0), store(s + j + W, p1), store(s + j + 2 * W, p2), store(s + j + 3 * W, p3);
    sum0 += p0, sum1 += p1, sum2 += p2, sum3 += p3;
  }
  for (; j < n; j += W) {
    const vf p = exp2(load(s + j) - base);
    store(s + j, p);
    sum0 += p;
  }
  const float scale = exp2(all(m - base))[0];
  store(l, load(l) * scale + ((sum0 + sum1) + (sum2 + sum3)));
  m = m_new;
  return scale;
}

inline void attend(const AttendTask& t) {
  const int64_t ldo = (t.headdim_v + W - 1) / W * W;
  constexpr int64_t lds = kBlock + W;  // off the power of two: rows must not share L1 sets
  float* const s = t.scratch;
  float* const row_scale = s + kGroup * lds;
  for (int64_t block = 0; block < t.keys; block += kBlock) {
    const int64_t block_end = block + kBlock < t.keys ? block + kBlock : t.keys;
    for (int64_t r0 = 0; r0 < t.rows; r0 += kGroup) {
      const int64_t rows = t.rows - r0 < kGroup ? t.rows - r0 : kGroup;
      const auto [first, last, partial] = seen_by(t.lo + r0, t.hi + r0, rows, block, block_end);
      if (last <= first) continue;
      const int64_t n = last - first;

      multiply_panels({t.q + r0 * t.headdim, t.headdim, 1, nullptr, 0, s, lds, t.headdim}, rows, t.k_panels, first,
                      last);
      for (int64_t r = 0; r < rows; ++r) {
        float* row = s + r * lds;
        if (t.softcap_log2 != 0.0f) softcap_row(row, n, t.softcap_log2);
        if (t.slope_log2) alibi_row(row, n, t.slope_log2[r0 + r], t.position[r0 + r] - first);
        if (partial) fill_outside(row, n, t.lo[r0 + r] - first, t.hi[r0 + r] - first, -kInfinity);
        row_scale[r] = softmax_row(row, n, t.m[r0 + r], t.l + (r0 + r) * W);
      }

      const Gemm g{s, lds, 1, nullptr, 0, t.o + r0 * ldo, ldo, n};
      if (!(partial && any_special(t.v_special, first, last))) {
        multiply_strips<Into::scale_add>(g, rows, t.v_strips, t.keys, first, ldo, row_scale);
        continue;
      }
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t lo = t.lo[r0 + r] > first ? t.lo[r0 + r] : first, hi = t.hi[r0 + r] < last ? t.hi[r0 + r] : last;
        const Gemm one{s + r * lds + (lo - first), lds, 1, nullptr, 0, g.c + r * ldo, ldo, hi > lo ? hi - lo : 0};
        multiply_strips<Into::scale_add>(one, 1, t.v_strips, t.keys, lo, ldo, row_scale + r);
      }
    }
  }
}

}  // namespace flash_attn::cpu::FLASH_ATTN_ISA
