#include "cpu/rows.hpp"

#include <algorithm>
#include <cmath>

#include "core/dropout.hpp"
#include "cpu/driver.hpp"

namespace flash_attn::cpu {

std::vector<int64_t> indices_of(const Left& left, const std::vector<Head>& heads) {
  std::vector<int64_t> indices;
  for (std::size_t i = 0; i < heads.size(); ++i)
    if (left[i]) indices.push_back(heads[i].index);
  return indices;
}

bool pack_panel(const Forward& f, const Head& head, const Pack& to, int64_t first) {
  const Problem& p = f.p;
  const AttendKernel& kernel = f.kernel;
  const char* rows[64];
  const int64_t hk = head.index % p.nheads_k, at = to.begin + first;
  const int64_t n = std::min(kernel.panel, head.sequence.seqlen_k - at);
  std::fill(rows, rows + kernel.panel, nullptr);
  key_rows(p, p.k, head.sequence, hk, at, n, rows);
  const bool k_special = kernel.pack_k({rows, kernel.panel, p.headdim, p.k.stride_col, p.dtype}, to.k, to.keys, first);
  key_rows(p, p.v, head.sequence, hk, at, n, rows);
  const bool v_special =
      kernel.pack_v({rows, kernel.panel, p.headdim_v, p.v.stride_col, p.dtype}, to.v, to.keys, first);
  to.v_special[first / kernel.panel] = v_special;
  return kernel.plain_only && (k_special || v_special);
}

static int64_t ldo(const Forward& f) { return round_up(f.p.headdim_v, f.k.width); }

SoftmaxSums take_sums(Arena& arena, const Forward& f) {
  const int64_t rows = f.plan.rows;
  return {arena.take<float>(rows * ldo(f)), arena.take<float>(rows), arena.take<float>(rows * f.k.width)};
}

SoftmaxSums skip_rows(const SoftmaxSums& sums, const Forward& f, int64_t row) {
  return {sums.o + row * ldo(f), sums.m + row, sums.l + row * f.k.width};
}

Rows::Rows(Arena& arena, const Forward& f)
    : q_(arena.take<char>(f.kernel.q_bytes(f.plan.rows, f.p.headdim))),
      tiles_(arena.take<char>(f.kernel.scratch)),
      slope_(arena.take<float>(f.plan.rows)),
      factor_(arena.take<float>(f.plan.rows)),
      lse_(arena.take<float>(f.plan.rows)),
      lo_(arena.take<int64_t>(f.plan.rows)),
      hi_(arena.take<int64_t>(f.plan.rows)),
      position_(arena.take<int64_t>(f.plan.rows)),
      q_rows_(arena.take<const char*>(f.plan.rows)),
      out_rows_(arena.take<const char*>(f.plan.rows)),
      bias_(arena.take<const char*>(f.plan.rows)),
      dropped_(arena.take<DropoutRow>(f.plan.rows)) {}

template <class Body>
void Rows::each(const Forward& f, const Body& body) const {
  const int64_t seqlen_q = head_.sequence.seqlen_q, first_head = head_.index % f.p.nheads_k * f.p.group();
  int64_t h = first_head + range_.first / seqlen_q, i = range_.first % seqlen_q;
  for (int64_t r = 0; r < range_.rows; ++r, ++i) {
    if (i == seqlen_q) i = 0, ++h;
    body(r, h, i);
  }
}

void Rows::find(const Forward& f, const Head& head, const RowRange& range) {
  const Problem& p = f.p;
  const Sequence& seq = head.sequence;
  const int64_t b = head.index / p.nheads_k;
  head_ = head, range_ = range, origin_ = 0;
  each(f, [&](int64_t r, int64_t h, int64_t i) {
    const Interval seen = p.scores.mask.row(i, seq.seqlen_q, seq.seqlen_k);
    lo_[r] = seen.lo;
    hi_[r] = seen.hi;
    position_[r] = i + seq.seqlen_k - seq.seqlen_q;
    slope_[r] = static_cast<float>(p.scores.alibi_slope(b, h) * kLog2e);
    dropped_[r] = {static_cast<uint32_t>(i), static_cast<uint32_t>(b * p.nheads + h)};
    if (p.scores.bias.present()) bias_[r] = p.scores.bias.at(b, i, h);
    q_rows_[r] = p.q.at(seq.q_batch, seq.q_row + i, h);
    out_rows_[r] = p.out.at(seq.q_batch, seq.q_row + i, h);
  });
}

bool Rows::see(int64_t begin, int64_t end) const {
  for (int64_t r = 0; r < range_.rows; ++r)
    if (std::max(lo_[r] + origin_, begin) < std::min(hi_[r] + origin_, end)) return true;
  return false;
}

bool Rows::start(const Forward& f, const SoftmaxSums& sums) {
  std::fill(sums.o, sums.o + range_.rows * ldo(f), 0.0f);
  std::fill(sums.l, sums.l + range_.rows * f.k.width, 0.0f);
  std::fill(sums.m, sums.m + range_.rows, -INFINITY);
  const bool special = f.kernel.pack_q({q_rows_, range_.rows, f.p.headdim, f.p.q.stride_col, f.p.dtype},
                                       score_scale(f.p.scores).sign, q_);
  return special && f.kernel.plain_only;
}

AttendTask Rows::task(const Forward& f, const SoftmaxSums& sums, int64_t begin, int64_t keys) {
  const ScoreScale scale = score_scale(f.p.scores);
  move_origin(f.p.scores, begin - origin_, range_.rows, lo_, hi_, position_, bias_);
  origin_ = begin;
  return {
      .rows = range_.rows,
      .headdim = f.p.headdim,
      .headdim_v = f.p.headdim_v,
      .q = q_,
      .keys = keys,
      .k = nullptr,
      .v = nullptr,
      .v_special = nullptr,
      .lo = lo_,
      .hi = hi_,
      .scale = scale.scale,
      .softcap_log2 = scale.softcap_log2,
      .slope_log2 = f.p.scores.alibi ? slope_ : nullptr,
      .position = position_,
      .bias = bias_rows(f.p.scores, bias_, range_.rows, origin_),
      .dropout = dropout_task(f.p.scores.dropout, dropped_, origin_),
      .o = sums.o,
      .m = sums.m,
      .l = sums.l,
      .scratch = tiles_,
  };
}

void Rows::attend(const Forward& f, const SoftmaxSums& sums, const Pack& keys) {
  AttendTask t = task(f, sums, keys.begin, keys.keys);
  t.k = keys.k, t.v = keys.v, t.v_special = keys.v_special;
  f.kernel.attend(t);
}

/// One more logit in the denominator: 1 / (l + e^sink) = 1 / l / (1 + e^(sink - lse)).
static void add_sink(double sink, float& factor, float& lse) {
  if (sink == -INFINITY) return;
  const double top = lse > sink ? lse : sink, bottom = lse > sink ? sink : lse;  // a NaN stays
  const double with_sink = top + std::log1p(std::exp(bottom - top));
  factor *= static_cast<float>(std::exp(lse - with_sink));
  lse = static_cast<float>(with_sink);
}

void Rows::finish(const Forward& f, const SoftmaxSums& sums) {
  const Problem& p = f.p;
  const Sequence& seq = head_.sequence;
  f.k.finish_rows(range_.rows, sums.m, sums.l, factor_, lse_);
  const float keep_scale = DropoutRule(p.scores.dropout).scale;
  each(f, [&](int64_t r, int64_t h, int64_t i) {
    if (p.scores.sink.present()) add_sink(sink_logit(p.scores, h), factor_[r], lse_[r]);
    factor_[r] *= keep_scale;
    if (p.lse.present())
      *reinterpret_cast<float*>(p.lse.at(seq.q_batch, seq.q_row + i, h)) =
          lse_[r] == -INFINITY ? p.empty_lse() : lse_[r];
  });
  f.k.store_rows({out_rows_, range_.rows, p.headdim_v, p.out.stride_col, p.dtype}, factor_, sums.o, ldo(f));
}

}  // namespace flash_attn::cpu
