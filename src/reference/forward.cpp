// out_i = sum_j Z_j P_j v_j, with P, Z and lse of softmax_row.hpp.
#include "reference/reference.hpp"
#include "reference/softmax_row.hpp"

namespace flash_attn::reference {

void forward(const Problem& p) {
  // Rows that belong to no sequence.
  fill(p.out, p.batch_q, p.rows_q, p.nheads, p.headdim_v, 0.0);
  if (p.lse.present()) fill(p.lse, p.batch_q, p.rows_q, p.nheads, 1, p.empty_lse());

  std::vector<double> q(p.headdim), out(p.headdim_v);
  for (int64_t b = 0; b < p.batch; ++b) {
    const Sequence sequence = p.sequences.at(b);
    const KeySource source(sequence, p.sequences.page_size);
    for (int64_t h_k = 0; h_k < p.nheads_k; ++h_k) {
      const Matrix keys = load_keys(p.k, source, sequence.seqlen_k, h_k, p.headdim);
      const Matrix values = load_keys(p.v, source, sequence.seqlen_k, h_k, p.headdim_v);
      for (int64_t h = h_k * p.group(); h < (h_k + 1) * p.group(); ++h) {
        for (int64_t i = 0; i < sequence.seqlen_q; ++i) {
          load_row(p.q, sequence.q_batch, sequence.q_row + i, h, q);
          const SoftmaxRow row = softmax_row(p, sequence, b, h, i, q, keys);

          out.assign(out.size(), 0.0);
          for (int64_t n = 0; n < row.size(); ++n) add_scaled(out, row.z[n] * row.p[n], values.row(row.visible.lo + n));

          store_row(p.out, sequence.q_batch, sequence.q_row + i, h, out);
          if (p.lse.present()) store(p.lse.at(sequence.q_batch, sequence.q_row + i, h), p.lse.dtype, row.lse);
        }
      }
    }
  }
}

}  // namespace flash_attn::reference
