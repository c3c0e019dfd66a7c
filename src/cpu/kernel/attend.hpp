// The forward: online softmax over key blocks (Milakov & Gimelshein 2018; Dao et al. 2022, algorithm 1; 2023, eq. 5).
//
//   for a block of keys (its K and V panels stay in L2):
//     for the rows of a score tile (12 x 512 scores stay in L1):
//       s = q k^T                          2 d FLOPs a score, register tiles
//       m' = max(m, max s); p = 2^(s - m'); l = l 2^(m - m') + sum p
//       o = o 2^(m - m') + p v             2 d FLOPs a score, register tiles; the scaling rides on loading o
//
// Cycles for W scores, at one W-wide FMA a cycle: 2 d for the products; about 12 for max, exp2 and sum; reading and
// writing o costs 2 d / block. Ceiling at d = 64: 128 / (128 + 12 + 1) = 91 %; at d = 128: 95 %.

namespace flash_attn::cpu::FLASH_ATTN_ISA {

inline constexpr int64_t kScoreRows = 12;  // 12 x 528 floats: 25 KB of L1
inline constexpr int64_t kScoreKeys = W == 16 ? 512 : 256;

/// The probabilities take the place of the scores.
struct Overwrite {
  float* s;
  void operator()(int64_t j, vf p0, vf p1) const { store(s + j, p0), store(s + j + W, p1); }
  void operator()(int64_t j, vf p) const { store(s + j, p); }
};

/// The softmax of rows [r0, r0 + rows): products s of keys [first, first + n) become probabilities, and
/// m and l take them up. row_scale (rows): the factor for the rows' o.
template <bool kDrops, int64_t kMost>
FLASH_ATTN_INLINE void softmax_rows(const AttendTask& t, int64_t r0, int64_t rows, float* s, int64_t lds, int64_t first,
                                    int64_t n, bool partial, float* base, float* row_scale) {
  float scale = 1.0f;
  for (int64_t r = 0; r < rows; ++r) scale = score_row(t, r0 + r, s + r * lds, first, n, partial);
  raise_maxima(s, lds, rows, n, scale, t.m + r0, base, row_scale);
  for (int64_t r = 0; r < rows; ++r) {
    float* const row = s + r * lds;
    exponentials_kept<kDrops, kMost>(t.dropout, r0 + r, first, row, n,
                                     is_huge(base[r]) ? scale_row(row, n, scale) : scale, base[r], row_scale[r],
                                     t.l + (r0 + r) * W, Overwrite{row});
  }
}

/// Compiled twice, so that dropout costs nothing where there is none.
template <bool kDrops>
__attribute__((noinline)) void attend(const AttendTask& t) {
  const int64_t ldo = pad_to(t.headdim_v, W);
  constexpr int64_t lds = kScoreKeys + W;  // off the power of two: rows must not share L1 sets
  const auto *q = reinterpret_cast<const float*>(t.q), *k_panels = reinterpret_cast<const float*>(t.k),
             *v_strips = reinterpret_cast<const float*>(t.v);
  float* const s = reinterpret_cast<float*>(t.scratch);
  float *const row_scale = s + kScoreRows * lds, *const base = row_scale + kScoreRows;
  const int64_t tiles_wide =
      (t.keys + kPanel - 1) / kPanel + (ldo + kPanel - 1) / kPanel * ((t.keys + kScoreKeys - 1) / kScoreKeys);
  Asker asker(t.ahead, t.aheads, (t.rows + full_rows(kPanelVectors) - 1) / full_rows(kPanelVectors) * tiles_wide);
  Asker* const asks = t.aheads > 0 ? &asker : nullptr;
  for (int64_t block = 0; block < t.keys; block += kScoreKeys) {
    const int64_t block_end = block + kScoreKeys < t.keys ? block + kScoreKeys : t.keys;
    for (int64_t r0 = 0; r0 < t.rows; r0 += kScoreRows) {
      const int64_t rows = t.rows - r0 < kScoreRows ? t.rows - r0 : kScoreRows;
      const auto [first, last, partial] = seen_by<kPanel, W>(t.lo + r0, t.hi + r0, rows, block, block_end);
      if (last <= first) continue;
      const int64_t n = last - first;

      for (int64_t j = first; j < last; j += kPanel) {
        const int64_t end = j + kPanel < last ? j + kPanel : last;
        prefetch_bias(t.bias, r0, rows, j, end);
        multiply_panels({q + r0 * t.headdim, t.headdim, 1, nullptr, 0, s + (j - first), lds, t.headdim, asks}, rows,
                        k_panels, j, end);
      }
      softmax_rows<kDrops, kScoreKeys>(t, r0, rows, s, lds, first, n, partial, base, row_scale);

      const Gemm g{s, lds, 1, nullptr, 0, t.o + r0 * ldo, ldo, n, asks};
      if (!(partial && any_special(t.v_special, first, last))) {
        multiply_strips<Into::scale_add>(g, rows, v_strips, t.keys, first, ldo, row_scale);
        continue;
      }
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t lo = t.lo[r0 + r] > first ? t.lo[r0 + r] : first, hi = t.hi[r0 + r] < last ? t.hi[r0 + r] : last;
        const Gemm one{s + r * lds + (lo - first), lds, 1, nullptr, 0, g.c + r * ldo, ldo, hi > lo ? hi - lo : 0};
        multiply_strips<Into::scale_add>(one, 1, v_strips, t.keys, lo, ldo, row_scale + r);
      }
    }
  }
  asker.finish();
}

inline void attend_any(const AttendTask& t) { t.dropout.threshold == 0 ? attend<false>(t) : attend<true>(t); }

inline int64_t attend_q_bytes(int64_t rows, int64_t headdim) { return rows * headdim * 4; }
inline int64_t attend_k_bytes(int64_t keys, int64_t headdim) { return keys * headdim * 4; }
inline int64_t attend_v_bytes(int64_t keys, int64_t headdim_v) { return keys * (pad_to(headdim_v, W)) * 4; }

inline bool attend_pack_q(const RowList& rows, float factor, char* q) {
  return load_rows(rows, factor, reinterpret_cast<float*>(q), rows.cols);
}
inline bool attend_pack_k(const RowList& rows, char* k, int64_t, int64_t first) {
  return pack_panel(rows, reinterpret_cast<float*>(k) + first * rows.cols);
}
inline bool attend_pack_v(const RowList& rows, char* v, int64_t keys, int64_t first) {
  return pack_strips(rows, reinterpret_cast<float*>(v), keys, first);
}

inline constexpr AttendKernel kAttendFp32 = {
    .name = "fp32",
    .panel = kPanel,
    .tile_rows = kScoreRows,
    .tile_keys = kScoreKeys,
    .scratch = (kScoreRows * (kScoreKeys + W) + 2 * kScoreRows + 15) / 16 * 64,
    .q_bytes = attend_q_bytes,
    .k_bytes = attend_k_bytes,
    .v_bytes = attend_v_bytes,
    .pack_q = attend_pack_q,
    .pack_k = attend_pack_k,
    .pack_v = attend_pack_v,
    .attend = attend_any,
    .attend_in_place = nullptr,
    .plain_only = false,
};

}  // namespace flash_attn::cpu::FLASH_ATTN_ISA
