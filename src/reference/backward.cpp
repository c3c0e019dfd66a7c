// Gradients of out and lse, row by row.
//
// With u, s, P, Z and lse of softmax_row.hpp, g = dout_i and e = dlse_i (0 if absent):
//
//   out = sum_j Z_j P_j v_j       =>  dv_j += Z_j P_j g          dP_j = Z_j (g . v_j)
//   P_j = exp(s_j - lse)          =>  dP_k / ds_j = P_k ([k = j] - P_j)
//   lse = log(sum_j exp(s_j))     =>  dlse / ds_j = P_j
//
//   ds_j    = P_j (dP_j - delta + e),     delta = sum_k P_k dP_k  (= g . out)
//   dsink   = P_sink (0 - delta + e)      the sink is a logit whose value vector is 0
//   dbias_j = ds_j,   du_j = ds_j (ds/du)_j,   dq = scale sum_j du_j k_j,   dk_j += scale du_j q
//
// P is computed afresh from q and k; the rounded out and lse of the call are not used. A row that sees nothing has
// P = 0 and leaves no gradient. Everything is summed in double and rounded once, at the end: dk and dv of one head of
// keys over all its sequences and query heads, dbias and dsink over all they are broadcast to.
#include "reference/reference.hpp"
#include "reference/softmax_row.hpp"

namespace flash_attn::reference {
namespace {

/// Sums of one head's dk or dv: one row for every row of the memory, in whatever sequence or page it is.
class KeyGradient {
 public:
  KeyGradient(const Problem& p, int64_t cols) : batch_(p.batch_k), rows_(p.rows_k), sum_(batch_ * rows_, cols) {}
  std::span<double> row(KeyPlace at) { return sum_.row(at.batch * rows_ + at.row); }
  void store_to(const Operand& x, int64_t head) const {
    for (int64_t b = 0; b < batch_; ++b) {
      for (int64_t r = 0; r < rows_; ++r) store_row(x, b, r, head, sum_.row(b * rows_ + r));
    }
  }

 private:
  int64_t batch_, rows_;
  Matrix sum_;
};

/// Sums of dbias, of the bias's own shape: a broadcast dimension has extent 1 and takes the sum.
class BiasGradient {
 public:
  explicit BiasGradient(const Problem& p)
      : x_(p.dbias),
        batch_(p.scores.bias_shape[0]),
        heads_(p.scores.bias_shape[1]),
        rows_(p.scores.bias_shape[2]),
        sum_(x_.present() ? batch_ * rows_ * heads_ : 0, p.scores.bias_shape[3]) {}

  std::span<double> row(int64_t b, int64_t i, int64_t h) {
    return sum_.row(((batch_ > 1 ? b : 0) * rows_ + (rows_ > 1 ? i : 0)) * heads_ + (heads_ > 1 ? h : 0));
  }
  void store() {
    for (int64_t b = 0; b < batch_; ++b) {
      for (int64_t i = 0; i < rows_; ++i) {
        for (int64_t h = 0; h < heads_; ++h) store_row(x_, b, i, h, row(b, i, h));
      }
    }
  }

 private:
  Operand x_;
  int64_t batch_, heads_, rows_;
  Matrix sum_;
};

}  // namespace

void backward(const Problem& p) {
  fill(p.dq, p.batch_q, p.rows_q, p.nheads, p.headdim, 0.0);  // rows that belong to no sequence
  BiasGradient dbias(p);
  std::vector<double> dsink(p.nheads), q(p.headdim), dq(p.headdim), dout(p.headdim_v), dp;

  for (int64_t h_k = 0; h_k < p.nheads_k; ++h_k) {
    KeyGradient dk(p, p.headdim), dv(p, p.headdim_v);
    for (int64_t b = 0; b < p.batch; ++b) {
      const Sequence sequence = p.sequences.at(b);
      const KeySource source(sequence, p.sequences.page_size);
      const Matrix keys = load_keys(p.k, source, sequence.seqlen_k, h_k, p.headdim);
      const Matrix values = load_keys(p.v, source, sequence.seqlen_k, h_k, p.headdim_v);
      for (int64_t h = h_k * p.group(); h < (h_k + 1) * p.group(); ++h) {
        for (int64_t i = 0; i < sequence.seqlen_q; ++i) {
          const int64_t q_row = sequence.q_row + i;
          load_row(p.q, sequence.q_batch, q_row, h, q);
          const SoftmaxRow row = softmax_row(p, sequence, b, h, i, q, keys);
          if (row.empty) continue;
          load_row(p.dout, sequence.q_batch, q_row, h, dout);
          const double dlse = p.dlse.present() ? load(p.dlse.at(sequence.q_batch, q_row, h), p.dlse.dtype) : 0.0;

          dp.resize(row.p.size());
          double delta = 0.0;
          for (int64_t n = 0; n < row.size(); ++n) {
            dp[n] = row.z[n] * dot(dout, values.row(row.visible.lo + n));
            delta += row.p[n] * dp[n];
          }

          dq.assign(dq.size(), 0.0);
          for (int64_t n = 0; n < row.size(); ++n) {
            const int64_t j = row.visible.lo + n;
            const KeyPlace at = source.place(j);
            const double ds = row.p[n] * (dp[n] - delta + dlse);
            const double du = ds * row.ds_du[n];
            add_scaled(dq, p.scores.scale * du, keys.row(j));
            add_scaled(dk.row(at), p.scores.scale * du, q);
            add_scaled(dv.row(at), row.z[n] * row.p[n], dout);
            if (p.dbias.present()) dbias.row(b, i, h)[j] += ds;
          }
          dsink[h] += row.p_sink * (dlse - delta);
          store_row(p.dq, sequence.q_batch, q_row, h, dq);
        }
      }
    }
    dk.store_to(p.dk, h_k);
    dv.store_to(p.dv, h_k);
  }
  if (p.dbias.present()) dbias.store();
  if (p.dsink.present()) {
    for (int64_t h = 0; h < p.nheads; ++h) store(element(p.dsink, 0, 0, h, 0), p.dsink.dtype, dsink[h]);
  }
}

}  // namespace flash_attn::reference
