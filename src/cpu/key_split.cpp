#include "cpu/key_split.hpp"

#include <cmath>

#include "cpu/memory.hpp"
#include "cpu/rounding.hpp"
#include "cpu/units.hpp"

namespace flash_attn::cpu {

KeySplit::KeySplit(Arena& arena, const BackwardPlan& plan, float* rows)
    : keys_(arena.take<char>(plan.key_bytes)),
      special_(arena.take<uint8_t>(plan.keys_per_split)),
      dk_(arena.take<float>(plan.keys_per_split * plan.ldq)),
      dv_(arena.take<float>(plan.keys_per_split * plan.ldo)),
      rows_(rows) {}

void KeySplit::begin_keys(const BackwardPass& pass, const Sequence& sequence, int64_t hk, int64_t begin, int64_t end) {
  sequence_ = sequence, hk_ = hk, begin_ = begin, end_ = end;
  packed_for_ = nullptr;
  pack_for(pass, pass.kernel);
}

bool KeySplit::pack(const BackwardPass& pass) {
  const Problem& p = pass.p;
  const int64_t panel = packed_for_->panel, keys = round_up(end_ - begin_, panel);
  bool special = false;
  for (int64_t j = 0; j < keys; j += panel) {
    const int64_t n = std::min(panel, end_ - begin_ - j);
    const char *k[kMostPacked], *v[kMostPacked];
    key_rows(p, p.k, sequence_, hk_, begin_ + j, n, k);
    key_rows(p, p.v, sequence_, hk_, begin_ + j, n, v);
    const bool x = packed_for_->pack_keys({k, n, p.headdim, p.k.stride_col, p.dtype},
                                          {v, n, p.headdim_v, p.v.stride_col, p.dtype}, keys_, keys, j);
    special_[j / panel] = x;
    special |= x;
  }
  return special;
}

/// Packs the keys for a kernel, or for the one that takes any. Sums made so far are kept.
void KeySplit::pack_for(const BackwardPass& pass, const BackwardKernel& kernel) {
  const BackwardKernel* const before = packed_for_;
  const int64_t keys = before ? round_up(end_ - begin_, before->panel) : 0;
  const auto keep_sums = [&](float* sums, int64_t cols, int64_t ld) {
    if (before && before->sum_rows) {
      before->sum_rows(sums, keys, cols, rows_);
      std::copy(rows_, rows_ + keys * ld, sums);
    }
    const int64_t all = round_up(end_ - begin_, std::max(pass.kernel.panel, pass.k.backward_any->panel));
    std::fill(sums + keys * ld, sums + all * ld, 0.0f);
  };
  keep_sums(dk_, pass.p.headdim, pass.plan.ldq);
  keep_sums(dv_, pass.p.headdim_v, pass.plan.ldo);
  packed_for_ = &kernel;
  if (pack(pass) && kernel.plain_only) pack_for(pass, *pass.k.backward_any);
}

const float* KeySplit::add_queries(const BackwardPass& pass, GradientRows& queries, const std::vector<Ahead>& ahead) {
  if (queries.pack_for(pass, *packed_for_) && packed_for_->plain_only) {
    pack_for(pass, *pass.k.backward_any);
    queries.pack_for(pass, *packed_for_);
  }
  BackwardTask task = queries.task_of_keys(pass, begin_);
  task.keys_packed = keys_;
  task.keys = round_up(end_ - begin_, packed_for_->panel);
  task.key_special = special_;
  task.dk = dk_;
  task.dv = dv_;
  task.ahead = ahead.data(), task.aheads = static_cast<int64_t>(ahead.size());
  packed_for_->backward(task);
  return task.dq;
}

void KeySplit::write_gradients(const BackwardPass& pass) {
  const Problem& p = pass.p;
  const int64_t keys = round_up(end_ - begin_, packed_for_->panel);
  const auto write = [&](const Operand& to, const float* sums, int64_t cols, int64_t ld, float factor) {
    if (packed_for_->sum_rows) packed_for_->sum_rows(sums, keys, cols, rows_);
    store_rows(pass.k, end_ - begin_, cols, to.stride_col, p.dtype, factor, packed_for_->sum_rows ? rows_ : sums, ld,
               [&](int64_t j) { return to.at(sequence_.k_batch, sequence_.k_row + begin_ + j, hk_); });
  };
  const float q_factor = score_scale(p.scores).q_factor;  // dk is summed over q_factor q; 0: so are its sums
  write(p.dk, dk_, p.headdim, pass.plan.ldq, q_factor == 0 ? 0.0f : static_cast<float>(p.scores.scale / q_factor));
  write(p.dv, dv_, p.headdim_v, pass.plan.ldo, 1.0f);
}

}  // namespace flash_attn::cpu
