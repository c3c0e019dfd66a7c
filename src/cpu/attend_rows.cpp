#include "cpu/attend_rows.hpp"

#include <algorithm>
#include <cmath>

#include "core/dropout.hpp"
#include "cpu/memory.hpp"
#include "cpu/rounding.hpp"
#include "cpu/units.hpp"

namespace flash_attn::cpu {

std::vector<int64_t> marked_indices(const RedoMarks& marks, const std::vector<Head>& heads) {
  std::vector<int64_t> indices;
  for (std::size_t i = 0; i < heads.size(); ++i)
    if (marks[i]) indices.push_back(heads[i].index);
  return indices;
}

Pack Pack::take(Arena& arena, const Plan& plan, const AttendKernel& kernel) {
  Pack pack{};
  pack.k = arena.take<char>(kernel.k_bytes(plan.pack_keys, plan.headdim));
  pack.v = arena.take<char>(kernel.v_bytes(plan.pack_keys, plan.headdim_v));
  pack.v_special = arena.take<uint8_t>(plan.pack_keys / kernel.panel);
  return pack;
}

bool pack_panel(const ForwardPass& pass, const Head& head, const Pack& to, int64_t first) {
  const Problem& p = pass.p;
  const AttendKernel& kernel = pass.kernel;
  const char* rows[kMostPacked];
  const int64_t hk = head.index % p.nheads_k, at = to.begin + first;
  const int64_t n = std::min(kernel.panel, head.sequence.seqlen_k - at);
  key_rows(p, p.k, head.sequence, hk, at, n, rows);
  const bool k_special = kernel.pack_k({rows, n, p.headdim, p.k.stride_col, p.dtype}, to.k, to.keys, first);
  key_rows(p, p.v, head.sequence, hk, at, n, rows);
  const bool v_special = kernel.pack_v({rows, n, p.headdim_v, p.v.stride_col, p.dtype}, to.v, to.keys, first);
  to.v_special[first / kernel.panel] = v_special;
  return kernel.plain_only && (k_special || v_special);
}

SoftmaxSums take_sums(Arena& arena, const Plan& plan) {
  return {arena.take<float>(plan.rows * plan.ldo), arena.take<float>(plan.rows),
          arena.take<float>(plan.rows * plan.width)};
}

SoftmaxSums skip_rows(const SoftmaxSums& sums, const Plan& plan, int64_t row) {
  return {sums.o + row * plan.ldo, sums.m + row, sums.l + row * plan.width};
}

AttendRows::AttendRows(Arena& arena, const Plan& plan, const AttendKernel& kernel)
    : terms_(arena, plan.rows),
      q_(arena.take<char>(kernel.q_bytes(plan.rows, plan.headdim))),
      scratch_(arena.take<char>(kernel.scratch)),
      factor_(arena.take<float>(plan.rows)),
      lse_(arena.take<float>(plan.rows)),
      q_rows_(arena.take<const char*>(plan.rows)),
      out_rows_(arena.take<const char*>(plan.rows)) {}

template <class Body>
void AttendRows::for_each_row(const ForwardPass& pass, const Body& body) const {
  const int64_t seqlen_q = head_.sequence.seqlen_q, first_head = head_.index % pass.p.nheads_k * pass.p.group();
  int64_t h = first_head + range_.first / seqlen_q, i = range_.first % seqlen_q;
  for (int64_t r = 0; r < range_.rows; ++r, ++i) {
    if (i == seqlen_q) i = 0, ++h;
    body(r, h, i);
  }
}

void AttendRows::look_up(const ForwardPass& pass, const Head& head, const RowRange& range) {
  const Problem& p = pass.p;
  const Sequence& seq = head.sequence;
  head_ = head, range_ = range;
  terms_.begin_sequence(seq, head.index / p.nheads_k);
  for_each_row(pass, [&](int64_t r, int64_t h, int64_t i) {
    terms_.add_query(p, h, i);
    q_rows_[r] = p.q.at(seq.q_batch, seq.q_row + i, h);
    out_rows_[r] = p.out.at(seq.q_batch, seq.q_row + i, h);
  });
}

bool AttendRows::begin_sums(const ForwardPass& pass, const SoftmaxSums& sums) {
  std::fill(sums.o, sums.o + range_.rows * pass.plan.ldo, 0.0f);
  std::fill(sums.l, sums.l + range_.rows * pass.plan.width, 0.0f);
  std::fill(sums.m, sums.m + range_.rows, -INFINITY);
  const bool special = pass.kernel.pack_q({q_rows_, range_.rows, pass.p.headdim, pass.p.q.stride_col, pass.p.dtype},
                                          score_scale(pass.p.scores).q_factor, q_);
  return special && pass.kernel.plain_only;
}

AttendTask AttendRows::task_of_keys(const ForwardPass& pass, const SoftmaxSums& sums, int64_t begin, int64_t keys) {
  AttendTask task{};
  terms_.count_from(pass.p, begin);
  terms_.describe(pass.p, task);
  task.q = q_;
  task.keys = keys;
  task.o = sums.o, task.m = sums.m, task.l = sums.l;
  task.scratch = scratch_;
  return task;
}

void AttendRows::attend(const ForwardPass& pass, const SoftmaxSums& sums, const Pack& keys,
                        const std::vector<Ahead>& ahead) {
  AttendTask task = task_of_keys(pass, sums, keys.begin, keys.keys);
  task.k = keys.k, task.v = keys.v, task.v_special = keys.v_special;
  task.ahead = ahead.data(), task.aheads = static_cast<int64_t>(ahead.size());
  pass.kernel.attend(task);
}

/// One more logit in the denominator: 1 / (l + e^sink) = 1 / l / (1 + e^(sink - lse)).
static void add_sink(double sink, float& factor, float& lse) {
  if (sink == -INFINITY) return;
  const double top = lse > sink ? lse : sink, bottom = lse > sink ? sink : lse;  // a NaN stays
  const double with_sink = top + std::log1p(std::exp(bottom - top));
  factor *= static_cast<float>(std::exp(lse - with_sink));
  lse = static_cast<float>(with_sink);
}

void AttendRows::write_results(const ForwardPass& pass, const SoftmaxSums& sums) {
  const Problem& p = pass.p;
  const Sequence& seq = head_.sequence;
  pass.k.finish_rows(range_.rows, sums.m, sums.l, factor_, lse_);
  const float keep_scale = DropoutRule(p.scores.dropout).scale;
  for_each_row(pass, [&](int64_t r, int64_t h, int64_t i) {
    if (p.scores.sink.present()) add_sink(sink_logit(p.scores, h), factor_[r], lse_[r]);
    factor_[r] *= keep_scale;
    if (p.lse.present())
      *reinterpret_cast<float*>(p.lse.at(seq.q_batch, seq.q_row + i, h)) =
          lse_[r] == -INFINITY ? p.empty_lse() : lse_[r];
  });
  pass.k.store_rows({out_rows_, range_.rows, p.headdim_v, p.out.stride_col, p.dtype}, factor_, sums.o, pass.plan.ldo);
}

}  // namespace flash_attn::cpu
