#include "cpu/key_split.hpp"

#include <algorithm>
#include <cmath>

#include "cpu/driver.hpp"

namespace flash_attn::cpu {

KeySplit::KeySplit(Arena& a, const Backward& f) {
  const int64_t keys = f.plan.keys_per_split, rows = f.plan.rows;
  const int64_t d = round_up(f.p.headdim, f.k.width), dv = round_up(f.p.headdim_v, f.k.width);
  keys_ = a.take<char>(f.plan.key_bytes), key_special_ = a.take<uint8_t>(keys);
  dk_ = a.take<float>(keys * d), dv_ = a.take<float>(keys * dv);
  rows_ = a.take<float>(f.kernel.sum_rows ? keys * std::max(d, dv) : 0);
  queries_ = a.take<char>(f.plan.query_bytes), row_special_ = a.take<uint8_t>(rows);
  scratch_ = a.take<char>(f.plan.scratch);
  dq_ = a.take<float>(rows * d);
  base_ = a.take<float>(rows), delta_ = a.take<float>(rows), slope_ = a.take<float>(rows);
  lo_ = a.take<int64_t>(rows), hi_ = a.take<int64_t>(rows), position_ = a.take<int64_t>(rows);
  bias_ = a.take<const char*>(rows), dbias_ = a.take<float*>(rows), dropped_ = a.take<DropoutRow>(rows);
}

// ---- keys ------------------------------------------------------------------------------------------------------

void KeySplit::take_keys(const Backward& f, const Sequence& sequence, int64_t b, int64_t hk, int64_t begin,
                         int64_t end) {
  sequence_ = sequence, b_ = b, hk_ = hk, begin_ = begin, end_ = end;
  kernel_ = nullptr;
  use(f, f.kernel);
}

bool KeySplit::pack_keys(const Backward& f) {
  const Problem& p = f.p;
  const int64_t panel = kernel_->panel, keys = round_up(end_ - begin_, panel);
  bool special = false;
  for (int64_t j = 0; j < keys; j += panel) {
    const int64_t n = std::min(panel, end_ - begin_ - j);
    const char *k[64] = {}, *v[64] = {};
    key_rows(p, p.k, sequence_, hk_, begin_ + j, n, k);
    key_rows(p, p.v, sequence_, hk_, begin_ + j, n, v);
    const bool x = kernel_->pack_keys({k, panel, p.headdim, p.k.stride_col, p.dtype},
                                      {v, panel, p.headdim_v, p.v.stride_col, p.dtype}, keys_, keys, j);
    key_special_[j / panel] = x;
    special |= x;
  }
  return special;
}

/// Packs the keys for a kernel, or for the one that takes any. Sums made so far are kept.
void KeySplit::use(const Backward& f, const BackwardKernel& kernel) {
  const int64_t d = round_up(f.p.headdim, f.k.width), dv = round_up(f.p.headdim_v, f.k.width);
  const BackwardKernel* const before = kernel_;
  const int64_t keys = before ? round_up(end_ - begin_, before->panel) : 0;
  const auto sums_so_far = [&](float* sums, int64_t cols, int64_t ld) {
    if (before && before->sum_rows) {
      before->sum_rows(sums, keys, cols, rows_);
      std::copy(rows_, rows_ + keys * ld, sums);
    }
    const int64_t all = round_up(end_ - begin_, std::max(f.kernel.panel, f.k.backward_any->panel));
    std::fill(sums + keys * ld, sums + all * ld, 0.0f);
  };
  sums_so_far(dk_, f.p.headdim, d);
  sums_so_far(dv_, f.p.headdim_v, dv);
  kernel_ = &kernel;
  if (pack_keys(f) && kernel.plain_only) use(f, *f.k.backward_any);
}

void KeySplit::store(const Backward& f) {
  const Problem& p = f.p;
  const int64_t keys = round_up(end_ - begin_, kernel_->panel);
  const auto store_sums = [&](const Operand& to, const float* sums, int64_t cols, float factor) {
    if (kernel_->sum_rows) kernel_->sum_rows(sums, keys, cols, rows_);
    store_rows(f.k, end_ - begin_, cols, to.stride_col, p.dtype, factor, kernel_->sum_rows ? rows_ : sums,
               round_up(cols, f.k.width),
               [&](int64_t j) { return to.at(sequence_.k_batch, sequence_.k_row + begin_ + j, hk_); });
  };
  store_sums(p.dk, dk_, p.headdim, static_cast<float>(std::abs(p.scores.scale)));
  store_sums(p.dv, dv_, p.headdim_v, 1.0f);
}

// ---- queries ---------------------------------------------------------------------------------------------------

void KeySplit::take_queries(const Backward& f, int64_t head, int64_t first, int64_t last) {
  head_ = head, first_ = first, last_ = last;
  if (pack_queries(f) && kernel_->plain_only) {
    use(f, *f.k.backward_any);
    pack_queries(f);
  }
  place_queries(f);
}

bool KeySplit::pack_queries(const Backward& f) {
  const Problem& p = f.p;
  const auto rows_of = [&](const Operand& x, int64_t r, int64_t n, int64_t cols, const char** rows) {
    for (int64_t i = 0; i < n; ++i) rows[i] = x.at(sequence_.q_batch, sequence_.q_row + first_ + r + i, head_);
    return RowList{rows, n, cols, x.stride_col, p.dtype};
  };
  const float sign = score_scale(p.scores).sign;
  const int64_t group = kernel_->group;
  bool special = false;
  for (int64_t r = 0; r < last_ - first_; r += group) {
    const char *q[64], *dout[64], *out[64];
    const int64_t n = std::min(group, last_ - first_ - r);
    const RowList dout_rows = rows_of(p.dout, r, n, p.headdim_v, dout);
    const bool x = kernel_->pack_queries(rows_of(p.q, r, n, p.headdim, q), dout_rows, sign, queries_, f.plan.rows, r);
    f.k.dot_rows(rows_of(p.out, r, n, p.headdim_v, out), dout_rows, delta_ + r);
    row_special_[r / group] = x;
    special |= x;
  }
  return special;
}

/// What the queries see of the keys, and the terms of their scores. Of a row that has no lse nothing is seen: a bias
/// may hide what the mask does not.
void KeySplit::place_queries(const Backward& f) {
  const Problem& p = f.p;
  const Operand& bias = p.scores.bias;
  const auto slope = static_cast<float>(p.scores.alibi_slope(b_, head_) * kLog2e);
  const int64_t bias_begin = begin_ * bias.stride_col * static_cast<int64_t>(size_of(bias.dtype));
  for (int64_t i = first_, r = 0; i < last_; ++i, ++r) {
    const int64_t row = sequence_.q_row + i;
    const float lse = *reinterpret_cast<const float*>(p.lse.at(sequence_.q_batch, row, head_));
    base_[r] = std::isinf(lse) ? INFINITY : static_cast<float>(lse * kLog2e);
    if (p.dlse.present()) delta_[r] -= *reinterpret_cast<const float*>(p.dlse.at(sequence_.q_batch, row, head_));
    const Interval seen = p.scores.mask.row(i, sequence_.seqlen_q, sequence_.seqlen_k);
    lo_[r] = seen.lo - begin_;
    hi_[r] = base_[r] == INFINITY ? lo_[r] : seen.hi - begin_;
    position_[r] = i + sequence_.seqlen_k - sequence_.seqlen_q - begin_;
    slope_[r] = slope;
    dropped_[r] = {static_cast<uint32_t>(i), static_cast<uint32_t>(b_ * p.nheads + head_)};
    if (bias.present()) bias_[r] = bias.at(b_, i, head_) + bias_begin;
    if (p.dbias.present()) dbias_[r] = reinterpret_cast<float*>(p.dbias.at(b_, i, head_)) + begin_ * p.dbias.stride_col;
  }
}

const float* KeySplit::attend(const Backward& f) {
  const Problem& p = f.p;
  const ScoreScale scale = score_scale(p.scores);
  const int64_t rows = last_ - first_;
  const int64_t padded = std::min(round_up(rows, kernel_->group), f.plan.rows);
  std::fill(dq_, dq_ + padded * round_up(p.headdim, f.k.width), 0.0f);
  kernel_->backward({
      .rows = rows,
      .headdim = p.headdim,
      .headdim_v = p.headdim_v,
      .queries = queries_,
      .keys_packed = keys_,
      .row_capacity = f.plan.rows,
      .keys = round_up(end_ - begin_, kernel_->panel),
      .base = base_,
      .delta = delta_,
      .row_special = row_special_,
      .key_special = key_special_,
      .lo = lo_,
      .hi = hi_,
      .scale = scale.scale,
      .softcap_log2 = scale.softcap_log2,
      .slope_log2 = p.scores.alibi ? slope_ : nullptr,
      .position = position_,
      .bias = bias_rows(p.scores, bias_, rows, begin_),
      .dropout = dropout_task(p.scores.dropout, dropped_, begin_),
      .dbias = p.dbias.present() ? dbias_ : nullptr,
      .dbias_stride = p.dbias.stride_col,
      .dbias_sums = dbias_sums(p),
      .dq = dq_,
      .dk = dk_,
      .dv = dv_,
      .scratch = scratch_,
  });
  if (p.dbias.present() && !dbias_sums(p)) clear_unseen(f);
  return dq_;
}

/// The gradients of the bias that the kernel does not write: those of keys that a row does not see.
void KeySplit::clear_unseen(const Backward& f) const {
  const int64_t keys = end_ - begin_;
  Operand x = f.p.dbias;
  for (int64_t r = 0; r < last_ - first_; ++r) {
    const int64_t lo = std::clamp<int64_t>(lo_[r], 0, keys), hi = std::clamp<int64_t>(hi_[r], lo, keys);
    x.data = reinterpret_cast<char*>(dbias_[r]);
    clear(x, 1, 1, 1, lo);
    x.data = reinterpret_cast<char*>(dbias_[r] + hi * x.stride_col);
    clear(x, 1, 1, 1, keys - hi);
  }
}

double KeySplit::sink_gradient(const Backward& f) const {
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
