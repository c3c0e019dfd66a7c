#include "cpu/query_rows.hpp"

#include <algorithm>
#include <cmath>

#include "cpu/driver.hpp"

namespace flash_attn::cpu {

QueryRows::QueryRows(Arena& a, const Backward& f) {
  const int64_t rows = f.plan.rows;
  queries_ = a.take<char>(f.plan.query_bytes), scratch_ = a.take<char>(f.plan.scratch);
  row_special_ = a.take<uint8_t>(rows);
  dq_ = a.take<float>(rows * round_up(f.p.headdim, f.k.width));
  base_ = a.take<float>(rows), delta_ = a.take<float>(rows), slope_ = a.take<float>(rows);
  lo_ = a.take<int64_t>(rows), hi_ = a.take<int64_t>(rows), position_ = a.take<int64_t>(rows);
  bias_ = a.take<const char*>(rows), dbias_ = a.take<float*>(rows), dropped_ = a.take<DropoutRow>(rows);
}

/// Of a row that has no lse nothing is seen: a bias may hide what the mask does not.
void QueryRows::find(const Backward& f, const Sequence& sequence, int64_t b, int64_t head, int64_t first,
                     int64_t last) {
  const Problem& p = f.p;
  sequence_ = sequence, head_ = head, first_ = first, last_ = last;
  kernel_ = nullptr;
  origin_ = 0;
  seen_ = {sequence.seqlen_k, 0};
  const auto slope = static_cast<float>(p.scores.alibi_slope(b, head) * kLog2e);
  for (int64_t i = first, r = 0; i < last; ++i, ++r) {
    const float lse = *reinterpret_cast<const float*>(p.lse.at(sequence.q_batch, sequence.q_row + i, head));
    base_[r] = std::isinf(lse) ? INFINITY : static_cast<float>(lse * kLog2e);
    const Interval seen = p.scores.mask.row(i, sequence.seqlen_q, sequence.seqlen_k);
    lo_[r] = seen.lo;
    hi_[r] = base_[r] == INFINITY ? seen.lo : seen.hi;
    if (lo_[r] < hi_[r]) seen_ = {std::min(seen_.lo, lo_[r]), std::max(seen_.hi, hi_[r])};
    position_[r] = i + sequence.seqlen_k - sequence.seqlen_q;
    slope_[r] = slope;
    dropped_[r] = {static_cast<uint32_t>(i), static_cast<uint32_t>(b * p.nheads + head)};
    if (p.scores.bias.present()) bias_[r] = p.scores.bias.at(b, i, head);
    if (p.dbias.present()) dbias_[r] = reinterpret_cast<float*>(p.dbias.at(b, i, head));
  }
}

bool QueryRows::see(int64_t begin, int64_t end) const { return seen_.lo < end && begin < seen_.hi; }

void QueryRows::count_from(const Backward& f, int64_t key) {
  const int64_t step = key - origin_, rows = last_ - first_;
  move_origin(f.p.scores, step, rows, lo_, hi_, position_, bias_);
  for (int64_t r = 0; f.p.dbias.present() && r < rows; ++r) dbias_[r] += step * f.p.dbias.stride_col;
  origin_ = key;
}

static RowList rows_of(const Operand& x, const Sequence& s, int64_t head, int64_t first, int64_t n, int64_t cols,
                       DType dtype, const char** rows) {
  for (int64_t i = 0; i < n; ++i) rows[i] = x.at(s.q_batch, s.q_row + first + i, head);
  return {rows, n, cols, x.stride_col, dtype};
}

void QueryRows::start(const Backward& f) {
  const Problem& p = f.p;
  constexpr int64_t kRun = 64;
  for (int64_t r = 0; r < last_ - first_; r += kRun) {
    const char *dout[kRun], *out[kRun];
    const int64_t n = std::min(kRun, last_ - first_ - r);
    f.k.dot_rows(rows_of(p.out, sequence_, head_, first_ + r, n, p.headdim_v, p.dtype, out),
                 rows_of(p.dout, sequence_, head_, first_ + r, n, p.headdim_v, p.dtype, dout), delta_ + r);
  }
  for (int64_t i = first_, r = 0; p.dlse.present() && i < last_; ++i, ++r)
    delta_[r] -= *reinterpret_cast<const float*>(p.dlse.at(sequence_.q_batch, sequence_.q_row + i, head_));
}

bool QueryRows::pack(const Backward& f, const BackwardKernel& kernel) {
  if (kernel_ == &kernel) return special_;
  const Problem& p = f.p;
  kernel_ = &kernel;
  special_ = false;
  for (int64_t r = 0; r < last_ - first_; r += kernel.group) {
    const char *q[64], *dout[64];
    const int64_t n = std::min(kernel.group, last_ - first_ - r);
    const bool special =
        kernel.pack_queries(rows_of(p.q, sequence_, head_, first_ + r, n, p.headdim, p.dtype, q),
                            rows_of(p.dout, sequence_, head_, first_ + r, n, p.headdim_v, p.dtype, dout),
                            score_scale(p.scores).sign, queries_, f.plan.rows, r);
    row_special_[r / kernel.group] = special;
    special_ |= special;
  }
  return special_;
}

BackwardTask QueryRows::task(const Backward& f, int64_t begin) {
  const Problem& p = f.p;
  const ScoreScale scale = score_scale(p.scores);
  const int64_t rows = last_ - first_;
  count_from(f, begin);
  zeros(f);
  return {
      .rows = rows,
      .headdim = p.headdim,
      .headdim_v = p.headdim_v,
      .queries = queries_,
      .keys_packed = nullptr,
      .row_capacity = f.plan.rows,
      .keys = 0,
      .base = base_,
      .delta = delta_,
      .row_special = row_special_,
      .key_special = nullptr,
      .lo = lo_,
      .hi = hi_,
      .scale = scale.scale,
      .softcap_log2 = scale.softcap_log2,
      .slope_log2 = p.scores.alibi ? slope_ : nullptr,
      .position = position_,
      .bias = bias_rows(p.scores, bias_, rows, begin),
      .dropout = dropout_task(p.scores.dropout, dropped_, begin),
      .dbias = p.dbias.present() ? dbias_ : nullptr,
      .dbias_stride = p.dbias.stride_col,
      .dbias_sums = dbias_sums(p),
      .dq = dq_,
      .dk = nullptr,
      .dv = nullptr,
      .scratch = scratch_,
  };
}

void QueryRows::clear_unseen_dbias(const Backward& f, int64_t begin, int64_t end) {
  count_from(f, begin);
  const int64_t keys = end - begin;
  Operand x = f.p.dbias;
  for (int64_t r = 0; r < last_ - first_; ++r) {
    const int64_t lo = std::clamp<int64_t>(lo_[r], 0, keys), hi = std::clamp<int64_t>(hi_[r], lo, keys);
    x.data = reinterpret_cast<char*>(dbias_[r]);
    clear(x, 1, 1, 1, lo);
    x.data = reinterpret_cast<char*>(dbias_[r] + hi * x.stride_col);
    clear(x, 1, 1, 1, keys - hi);
  }
}

/// Rows that pad a group are cleared too: kernels add to them.
const float* QueryRows::zeros(const Backward& f) {
  const int64_t rows = std::min(round_up(last_ - first_, kernel_ ? kernel_->group : 1), f.plan.rows);
  std::fill(dq_, dq_ + rows * round_up(f.p.headdim, f.k.width), 0.0f);
  return dq_;
}

double QueryRows::sink_gradient(const Backward& f) const {
  // The sink is a key without a value, so u = -delta.
  const double sink = sink_logit(f.p.scores, head_) * kLog2e;
  double sum = 0;
  for (int64_t r = 0; r < last_ - first_; ++r) {
    const double probability = std::exp2(sink - base_[r]);
    if (probability > 0) sum -= probability * delta_[r];
  }
  return sum;
}

}  // namespace flash_attn::cpu
