// The backward: scores again from q, k and lse, then five products on the same register tiles (Dao 2023, algorithm 2).
//
//   for a block of keys (K twice, V, and the dk, dv sums stay in L2):
//     for the rows of a score tile (48 x 192 of p and dx stay near L1):
//       x = q k^T,  u = dout v^T                  row-major A
//       p = 2^(s(x) - base),  dx = p (z u - delta), p = z p      z: dropout
//       dv += p^T dout,  dk += dx^T q             column-major A: no transpose is ever made
//       dq += dx k                                row-major A
//
// 10 d FLOPs a score. A score tile of G rows and N keys read and write dv, dk (dq) once per G rows (N keys):
// 2 / G + 1 / N loads and stores for 5 FMAs of d columns.

namespace flash_attn::cpu::FLASH_ATTN_ISA {

inline constexpr int64_t kBackwardRows = 48;
inline constexpr int64_t kBackwardKeys = W == 16 ? 192 : 128;

/// C (rows, cols) += A . B with B row-major, g.ldb apart.
FLASH_ATTN_INLINE void multiply_rows(Gemm g, int64_t rows, int64_t cols) {
  for (int64_t c = 0; c < cols; c += kPanel, g.b += kPanel, g.c += kPanel)
    tile_rows<Into::add>((cols - c >= kPanel ? kPanel : cols - c) / W, g, rows, nullptr);
}

inline void backward(const BackwardTask& t) {
  const int64_t ldq = pad_to(t.headdim, W), ldv = pad_to(t.headdim_v, W);
  const float* const all_q = reinterpret_cast<const float*>(t.queries);
  const float* const all_dout = all_q + t.row_capacity * ldq;
  const float* const k_panels = reinterpret_cast<const float*>(t.keys_packed);
  const float* const v_panels = k_panels + t.keys * t.headdim;
  const float* const k_strips = v_panels + t.keys * t.headdim_v;
  constexpr int64_t lds = kBackwardKeys + W;
  float* const p = reinterpret_cast<float*>(t.scratch);
  float* const dx = p + kBackwardRows * lds;
  // Tiles of x, u, dv, dk and dq: (rows / 6) by panels, (keys / 6) by strips, and (rows / 6) by strips.
  constexpr int64_t kRows = full_rows(kPanelVectors);
  const auto pieces = [](int64_t n, int64_t of) { return (n + of - 1) / of; };
  Asker asker(t.ahead, t.aheads,
              pieces(t.rows, kRows) * (2 * pieces(t.keys, kPanel) + pieces(ldq, kPanel)) +
                  pieces(t.rows, kBackwardRows) * pieces(t.keys, kRows) * (pieces(ldq, kPanel) + pieces(ldv, kPanel)));
  Asker* const asks = t.aheads > 0 ? &asker : nullptr;
  for (int64_t block = 0; block < t.keys; block += kBackwardKeys) {
    const int64_t block_end = block + kBackwardKeys < t.keys ? block + kBackwardKeys : t.keys;
    for (int64_t r0 = 0; r0 < t.rows; r0 += kBackwardRows) {
      const int64_t rows = t.rows - r0 < kBackwardRows ? t.rows - r0 : kBackwardRows;
      const auto [first, last, partial] = seen_by<kPanel, W>(t.lo + r0, t.hi + r0, rows, block, block_end);
      if (last <= first) continue;
      const int64_t n = last - first;
      const float *q = all_q + r0 * ldq, *dout = all_dout + r0 * ldv;
      float *dq = t.dq + r0 * ldq, *dk = t.dk + first * ldq, *dv = t.dv + first * ldv;

      for (int64_t j = first; j < last; j += kPanel) {
        const int64_t end = j + kPanel < last ? j + kPanel : last;
        prefetch_bias(t.bias, r0, rows, j, end);
        multiply_panels({q, ldq, 1, nullptr, 0, p + (j - first), lds, t.headdim, asks}, rows, k_panels, j, end);
      }
      multiply_panels({dout, ldv, 1, nullptr, 0, dx, lds, t.headdim_v, asks}, rows, v_panels, first, last);
      for (int64_t r = 0; r < rows; ++r)
        gradient_row<kBackwardKeys>(t, r0 + r, p + r * lds, dx + r * lds, first, n, partial);

      if (!(partial && (t.row_special[r0 / kBackwardRows] || any_special(t.key_special, first, last)))) {
        multiply_rows({p, 1, lds, dout, ldv, dv, ldv, rows, asks}, n, ldv);
        multiply_rows({dx, 1, lds, q, ldq, dk, ldq, rows, asks}, n, ldq);
        multiply_strips<Into::add>({dx, lds, 1, nullptr, 0, dq, ldq, n, asks}, rows, k_strips, t.keys, first, ldq,
                                   nullptr);
        continue;
      }
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t lo = t.lo[r0 + r] > first ? t.lo[r0 + r] : first, hi = t.hi[r0 + r] < last ? t.hi[r0 + r] : last;
        if (hi <= lo) continue;
        const float *p_row = p + r * lds + (lo - first), *dx_row = dx + r * lds + (lo - first);
        multiply_rows({p_row, 1, 0, dout + r * ldv, 0, t.dv + lo * ldv, ldv, 1}, hi - lo, ldv);
        multiply_rows({dx_row, 1, 0, q + r * ldq, 0, t.dk + lo * ldq, ldq, 1}, hi - lo, ldq);
        multiply_strips<Into::add>({dx_row, lds, 1, nullptr, 0, dq + r * ldq, ldq, hi - lo}, 1, k_strips, t.keys, lo,
                                   ldq, nullptr);
      }
    }
  }
  asker.finish();
}

inline int64_t backward_query_bytes(int64_t rows, int64_t headdim, int64_t headdim_v) {
  return 4 * rows * (pad_to(headdim, W) + pad_to(headdim_v, W));
}
inline int64_t backward_key_bytes(int64_t keys, int64_t headdim, int64_t headdim_v) {
  return 4 * keys * (headdim + headdim_v + pad_to(headdim, W));
}

/// q, then dout: (row_capacity, cols padded with zeros to the width).
inline bool backward_pack_queries(const RowList& q, const RowList& dout, float factor, char* to, int64_t row_capacity,
                                  int64_t first) {
  const auto load_padded = [first](const RowList& rows, float factor, float* all_rows) {
    const int64_t ld = pad_to(rows.cols, W);
    float* const at = all_rows + first * ld;
    if (ld > rows.cols) std::memset(at, 0, static_cast<std::size_t>(4 * rows.rows * ld));
    return load_rows(rows, factor, at, ld);
  };
  float* const all_q = reinterpret_cast<float*>(to);
  const bool special_q = load_padded(q, factor, all_q);
  return load_padded(dout, 1.0f, all_q + row_capacity * pad_to(q.cols, W)) || special_q;
}

/// Panels of k, panels of v, strips of k. A special value in v reaches nothing that it should not: u of a key that a
/// row does not see is overwritten.
inline bool backward_pack_keys(const RowList& k, const RowList& v, char* to, int64_t keys, int64_t first) {
  float* const k_panels = reinterpret_cast<float*>(to);
  float* const v_panels = k_panels + keys * k.cols;
  pack_panel(k, k_panels + first * k.cols);
  pack_panel(v, v_panels + first * v.cols);
  return pack_strips(k, v_panels + keys * v.cols, keys, first);
}

inline constexpr BackwardKernel kBackwardFp32 = {
    .name = "fp32",
    .panel = kPanel,
    .tile_rows = kBackwardRows,
    .tile_keys = kBackwardKeys,
    .scratch = 2 * kBackwardRows * (kBackwardKeys + W) * 4,
    .query_bytes = backward_query_bytes,
    .key_bytes = backward_key_bytes,
    .pack_queries = backward_pack_queries,
    .pack_keys = backward_pack_keys,
    .backward = backward,
    .sum_rows = nullptr,
    .plain_only = false,
};

}  // namespace flash_attn::cpu::FLASH_ATTN_ISA
