#include "cpu/gradient_rows.hpp"

#include <algorithm>
#include <cmath>

#include "cpu/memory.hpp"
#include "cpu/rounding.hpp"
#include "cpu/units.hpp"

namespace flash_attn::cpu {

GradientRows::GradientRows(Arena& arena, const BackwardPlan& plan)
    : terms_(arena, plan.rows),
      queries_(arena.take<char>(plan.query_bytes)),
      scratch_(arena.take<char>(plan.scratch)),
      row_special_(arena.take<uint8_t>(plan.rows)),
      dq_(arena.take<float>(plan.rows * plan.ldq)),
      base_(arena.take<float>(plan.rows)),
      delta_(arena.take<float>(plan.rows)),
      largest_(arena.take<float>(plan.rows)),
      dbias_(arena.take<float*>(plan.rows)) {}

/// Of a row that has no lse nothing is seen: a bias may hide what the mask does not.
void GradientRows::look_up(const BackwardPass& pass, const Sequence& sequence, int64_t b, int64_t head, int64_t first,
                           int64_t last) {
  const Problem& p = pass.p;
  sequence_ = sequence, b_ = b, head_ = head, first_ = first, last_ = last;
  packed_for_ = nullptr;
  dbias_origin_ = 0;
  terms_.begin_sequence(sequence, b);
  for (int64_t i = first, r = 0; i < last; ++i, ++r) {
    const float lse = *reinterpret_cast<const float*>(p.lse.at(sequence.q_batch, sequence.q_row + i, head));
    base_[r] = std::isinf(lse) ? INFINITY : to_log2(lse);
    largest_[r] = 0.0f;
    terms_.add_query(p, head, i, std::isinf(lse));
    if (p.dbias.present()) dbias_[r] = reinterpret_cast<float*>(p.dbias.at(b, i, head));
  }
}

void GradientRows::count_from(const BackwardPass& pass, int64_t key) {
  terms_.count_from(pass.p, key);
  for (int64_t r = 0; pass.p.dbias.present() && r < rows(); ++r)
    dbias_[r] += (key - dbias_origin_) * pass.p.dbias.stride_col;
  dbias_origin_ = key;
}

static RowList rows_of(const Operand& x, const Sequence& s, int64_t head, int64_t first, int64_t n, int64_t cols,
                       DType dtype, const char** rows) {
  for (int64_t i = 0; i < n; ++i) rows[i] = x.at(s.q_batch, s.q_row + first + i, head);
  return {rows, n, cols, x.stride_col, dtype};
}

void GradientRows::compute_delta(const BackwardPass& pass) {
  const Problem& p = pass.p;
  for (int64_t r = 0; r < rows(); r += kMostPacked) {
    const char *dout[kMostPacked], *out[kMostPacked];
    const int64_t n = std::min(kMostPacked, rows() - r);
    pass.k.dot_rows(rows_of(p.out, sequence_, head_, first_ + r, n, p.headdim_v, p.dtype, out),
                    rows_of(p.dout, sequence_, head_, first_ + r, n, p.headdim_v, p.dtype, dout), delta_ + r);
  }
  for (int64_t r = 0; p.dlse.present() && r < rows(); ++r)
    delta_[r] -= *reinterpret_cast<const float*>(p.dlse.at(sequence_.q_batch, sequence_.q_row + first_ + r, head_));
  if (p.scores.bias.present()) share_hidden_rows(pass);
}

void GradientRows::share_hidden_rows(const BackwardPass& pass) {
  const Problem& p = pass.p;
  for (int64_t r = 0; r < rows(); ++r) {
    if (!(std::abs(base_[r]) >= kHugeScore) || std::isinf(base_[r])) continue;
    const char* row;
    const RowList dout = rows_of(p.dout, sequence_, head_, first_ + r, 1, p.headdim_v, p.dtype, &row);
    float square;
    pass.k.dot_rows(dout, dout, &square);
    if (square == 0.0f && delta_[r] == 0.0f) continue;  // padding: no gradient comes to it
    largest_[r] = -std::log2(static_cast<float>(std::max<int64_t>(1, largest_scores(pass, r))));
  }
}

int64_t GradientRows::largest_scores(const BackwardPass& pass, int64_t r) const {
  const Problem& p = pass.p;
  const ScorePipeline& scores = p.scores;
  const int64_t i = first_ + r, position = i + sequence_.seqlen_k - sequence_.seqlen_q;
  const double base = base_[r], least = base - std::abs(base) * 0x1p-20;
  const Interval seen = scores.mask.row(i, sequence_.seqlen_q, sequence_.seqlen_k);
  const char* const bias = scores.bias.at(b_, i, head_);
  const int64_t bias_step = scores.bias.stride_col * static_cast<int64_t>(size_of(scores.bias.dtype));
  const double slope = scores.alibi ? scores.alibi_slope(b_, head_) : 0.0;
  const char *q[kMostPacked], *k[kMostPacked];
  float dots[kMostPacked];
  int64_t count = 0;
  for (int64_t first = seen.lo; first < seen.hi; first += kMostPacked) {
    const int64_t n = std::min(kMostPacked, seen.hi - first);
    for (int64_t j = 0; j < n; ++j) {
      q[j] = p.q.at(sequence_.q_batch, sequence_.q_row + i, head_);
      k[j] = p.k.at(sequence_.k_batch, sequence_.k_row + first + j, head_ / p.group());
    }
    pass.k.dot_rows({q, n, p.headdim, p.q.stride_col, p.dtype}, {k, n, p.headdim, p.k.stride_col, p.dtype}, dots);
    for (int64_t j = 0; j < n; ++j) {
      double s = scores.scale * dots[j];
      if (scores.softcap > 0) s = scores.softcap * std::tanh(s / scores.softcap);
      s -= slope * static_cast<double>(std::abs(position - first - j));
      s += load_number(bias + (first + j) * bias_step, scores.bias.dtype);
      count += to_log2(s) > least;
    }
  }
  return count;
}

bool GradientRows::pack_for(const BackwardPass& pass, const BackwardKernel& kernel) {
  if (packed_for_ == &kernel) return special_;
  const Problem& p = pass.p;
  packed_for_ = &kernel;
  special_ = false;
  for (int64_t r = 0; r < rows(); r += kernel.tile_rows) {
    const char *q[kMostPacked], *dout[kMostPacked];
    const int64_t n = std::min(kernel.tile_rows, rows() - r);
    const bool special =
        kernel.pack_queries(rows_of(p.q, sequence_, head_, first_ + r, n, p.headdim, p.dtype, q),
                            rows_of(p.dout, sequence_, head_, first_ + r, n, p.headdim_v, p.dtype, dout),
                            score_scale(p.scores).q_factor, queries_, pass.plan.rows, r);
    row_special_[r / kernel.tile_rows] = special;
    special_ |= special;
  }
  return special_;
}

BackwardTask GradientRows::task_of_keys(const BackwardPass& pass, int64_t begin) {
  BackwardTask task{};
  count_from(pass, begin);
  clear_dq(pass);
  terms_.describe(pass.p, task);
  task.queries = queries_;
  task.row_capacity = pass.plan.rows;
  task.base = base_;
  task.delta = delta_;
  task.largest = largest_;
  task.row_special = row_special_;
  task.dbias = pass.p.dbias.present() ? dbias_ : nullptr;
  task.dbias_stride = pass.p.dbias.stride_col;
  task.dbias_sums = dbias_sums(pass.p);
  task.dq = dq_;
  task.scratch = scratch_;
  return task;
}

void GradientRows::clear_unseen_dbias(const BackwardPass& pass, int64_t begin, int64_t end) {
  count_from(pass, begin);
  const int64_t keys = end - begin;
  Operand x = pass.p.dbias;
  for (int64_t r = 0; r < rows(); ++r) {
    const Interval seen = terms_.seen_by(r);
    const int64_t lo = std::clamp<int64_t>(seen.lo, 0, keys), hi = std::clamp<int64_t>(seen.hi, lo, keys);
    x.data = reinterpret_cast<char*>(dbias_[r]);
    clear(x, 1, 1, 1, lo);
    x.data = reinterpret_cast<char*>(dbias_[r] + hi * x.stride_col);
    clear(x, 1, 1, 1, keys - hi);
  }
}

/// Rows that pad a tile are cleared too: kernels add to them.
const float* GradientRows::clear_dq(const BackwardPass& pass) {
  const int64_t padded = std::min(round_up(rows(), packed_for_ ? packed_for_->tile_rows : 1), pass.plan.rows);
  std::fill(dq_, dq_ + padded * pass.plan.ldq, 0.0f);
  return dq_;
}

double GradientRows::sink_gradient(const BackwardPass& pass) const {
  // The sink is a key without a value, so u = -delta.
  const double sink = sink_logit(pass.p.scores, head_) * kLog2e;
  double sum = 0;
  for (int64_t r = 0; r < rows(); ++r) {
    const double probability = std::exp2(sink - base_[r]);
    if (probability > 0) sum -= probability * delta_[r];
  }
  return sum;
}

}  // namespace flash_attn::cpu
