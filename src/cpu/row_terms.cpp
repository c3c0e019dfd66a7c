#include "cpu/row_terms.hpp"

#include <algorithm>

#include "core/dropout.hpp"
#include "cpu/units.hpp"

namespace flash_attn::cpu {

RowTerms::RowTerms(Arena& arena, int64_t capacity)
    : lo_(arena.take<int64_t>(capacity)),
      hi_(arena.take<int64_t>(capacity)),
      position_(arena.take<int64_t>(capacity)),
      slope_(arena.take<float>(capacity)),
      bias_(arena.take<const char*>(capacity)),
      dropped_(arena.take<DropoutRow>(capacity)) {}

void RowTerms::begin_sequence(const Sequence& sequence, int64_t b) {
  sequence_ = sequence, batch_entry_ = b;
  size_ = origin_ = 0;
  seen_ = {sequence.seqlen_k, 0};
}

void RowTerms::add_query(const Problem& p, int64_t head, int64_t i, bool hidden) {
  const int64_t r = size_++, b = batch_entry_;
  const Interval seen = p.scores.mask.row(i, sequence_.seqlen_q, sequence_.seqlen_k);
  lo_[r] = seen.lo;
  hi_[r] = hidden ? seen.lo : seen.hi;
  if (lo_[r] < hi_[r]) seen_ = {std::min(seen_.lo, lo_[r]), std::max(seen_.hi, hi_[r])};
  position_[r] = i + sequence_.seqlen_k - sequence_.seqlen_q;
  slope_[r] = to_log2(p.scores.alibi_slope(b, head));
  if (p.scores.bias.present()) bias_[r] = p.scores.bias.at(b, i, head);
  dropped_[r] = {static_cast<uint32_t>(i), static_cast<uint32_t>(b * p.nheads + head)};
}

void RowTerms::count_from(const Problem& p, int64_t key) {
  const int64_t step = key - origin_;
  const Operand& bias = p.scores.bias;
  const int64_t bias_step = step * bias.stride_col * static_cast<int64_t>(size_of(bias.dtype));
  for (int64_t r = 0; step != 0 && r < size_; ++r) {
    lo_[r] -= step, hi_[r] -= step, position_[r] -= step;
    if (bias.present()) bias_[r] += bias_step;
  }
  origin_ = key;
}

template <class Task>
void RowTerms::describe(const Problem& p, Task& task) const {
  const ScoreScale scale = score_scale(p.scores);
  const DropoutRule rule(p.scores.dropout);
  const Operand& bias = p.scores.bias;
  task.rows = size_;
  task.headdim = p.headdim, task.headdim_v = p.headdim_v;
  task.lo = lo_, task.hi = hi_;
  task.scale = scale.scale, task.softcap_log2 = scale.softcap_log2;
  task.slope_log2 = p.scores.alibi ? slope_ : nullptr;
  task.position = position_;
  task.bias = {};
  if (bias.present()) task.bias = {bias_, size_, p.scores.bias_shape[3] - origin_, bias.stride_col, bias.dtype};
  task.dropout = {.threshold = static_cast<int32_t>(rule.threshold),
                  .scale = rule.scale,
                  .key = {rule.key()[0], rule.key()[1]},
                  .offset = static_cast<uint32_t>(rule.offset),
                  .first_key = origin_,
                  .rows = dropped_};
}
template void RowTerms::describe(const Problem&, AttendTask&) const;
template void RowTerms::describe(const Problem&, BackwardTask&) const;

}  // namespace flash_attn::cpu
