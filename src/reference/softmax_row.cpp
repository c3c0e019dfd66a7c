#include "reference/softmax_row.hpp"

#include <cmath>
#include <cstdlib>
#include <limits>

#include "core/dropout.hpp"

namespace flash_attn::reference {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

/// The larger of two logits; NaN if either is, so that it reaches the whole row.
double larger(double a, double b) { return std::isnan(b) || b > a ? b : a; }

/// The logits s_j (into row.p) and their slopes ds/du.
void fill_logits(const Problem& problem, const Sequence& sequence, int64_t b, int64_t h, int64_t i,
                 std::span<const double> q, const Matrix& keys, SoftmaxRow& row) {
  const ScorePipeline& scores = problem.scores;
  const int64_t position = i + sequence.seqlen_k - sequence.seqlen_q;
  for (int64_t j = row.visible.lo; j < row.visible.hi; ++j) {
    double s = scores.scale * dot(q, keys.row(j));
    double ds_du = 1.0;
    if (scores.softcap != 0.0) {
      const double t = std::tanh(s / scores.softcap);
      s = scores.softcap * t;
      ds_du = 1.0 - t * t;
    }
    if (scores.alibi) s -= double{scores.alibi_slope(b, h)} * static_cast<double>(std::abs(position - j));
    if (scores.bias.present()) s += load(element(scores.bias, b, i, h, j), scores.bias.dtype);
    row.p.push_back(s);
    row.ds_du.push_back(ds_du);
  }
}

}  // namespace

SoftmaxRow softmax_row(const Problem& problem, const Sequence& sequence, int64_t b, int64_t h, int64_t i,
                       std::span<const double> q, const Matrix& keys) {
  const ScorePipeline& scores = problem.scores;
  SoftmaxRow row;
  row.visible = scores.mask.row(i, sequence.seqlen_q, sequence.seqlen_k);
  fill_logits(problem, sequence, b, h, i, q, keys, row);

  const double sink = scores.sink.present() ? load(element(scores.sink, 0, 0, h, 0), scores.sink.dtype) : -kInfinity;
  double largest = sink;
  for (double s : row.p) largest = larger(largest, s);

  row.empty = largest == -kInfinity;
  if (row.empty) {
    for (double& p : row.p) p = 0.0;
    row.lse = problem.empty_lse();
  } else {
    row.p_sink = std::exp(sink - largest);
    double sum = row.p_sink;
    for (double& p : row.p) sum += p = std::exp(p - largest);
    for (double& p : row.p) p /= sum;
    row.p_sink /= sum;
    row.lse = largest + std::log(sum);
  }

  const DropoutRule dropout(scores.dropout);
  const int64_t bh = b * problem.nheads + h;
  for (int64_t j = row.visible.lo; j < row.visible.hi; ++j) {
    row.z.push_back(!dropout.active() ? 1.0 : dropout.keep(bh, i, j) ? double{dropout.scale} : 0.0);
  }
  return row;
}

}  // namespace flash_attn::reference
