// SoftmaxRow: one query row through the score pipeline, up to the probabilities. Forward and backward share it.
//
//   u_j = scale * q.k_j                                   for the keys j in [lo, hi) that the row sees
//   s_j = softcap * tanh(u_j / softcap) - slope * |p - j| + bias_j,   p = i + seqlen_k - seqlen_q
//   lse = log(sum_j exp(s_j) + exp(sink))                 natural logarithm
//   P_j = exp(s_j - lse),  P_sink = exp(sink - lse)
//   Z_j = 0 if dropout drops (b, h, i, j), else its scale; 1 without dropout
//
// If no logit is above -inf the row sees nothing: P = 0 and lse is problem.empty_lse().
#pragma once

#include <vector>

#include "reference/matrix.hpp"

namespace flash_attn::reference {

struct SoftmaxRow {
  Interval visible;           // keys [lo, hi); the vectors below are indexed by j - lo
  std::vector<double> p;      // P_j
  std::vector<double> z;      // Z_j
  std::vector<double> ds_du;  // d s_j / d u_j: 1, or 1 - tanh^2 under softcap
  double p_sink = 0.0;
  double lse = 0.0;
  bool empty = false;  // sees nothing

  int64_t size() const { return visible.hi - visible.lo; }
};

/// Row i of query head h of sequence b: q is (headdim), keys is (seqlen_k, headdim).
SoftmaxRow softmax_row(const Problem& problem, const Sequence& sequence, int64_t b, int64_t h, int64_t i,
                       std::span<const double> q, const Matrix& keys);

}  // namespace flash_attn::reference
