// A worker's memory in the backward, and the partial dq that tasks share.
#pragma once

#include <vector>

#include "cpu/key_split.hpp"

namespace flash_attn::cpu {

struct BackwardWorker {
  GradientRows queries;
  std::vector<KeySplit> splits;
  std::vector<Ahead> ahead;

  BackwardWorker(Arena& arena, const BackwardPlan& plan) : queries(arena, plan) {
    float* const rows = KeySplit::take_rows(arena, plan);
    for (int64_t i = 0; i < plan.splits_at_once; ++i) splits.emplace_back(arena, plan, rows);
  }
};

/// Partial dq of a key head: one for each split, or one for all if a worker adds them up.
inline int64_t partials_of_head(const BackwardPlan& plan) { return plan.chained ? 1 : plan.splits; }
/// (partials, group, max_seqlen_q, ldq) of a key head.
inline int64_t partial_floats(const BackwardPlan& plan, const Problem& p) {
  return partials_of_head(plan) * p.group() * p.max_seqlen_q * plan.ldq;
}
/// Those of a wave; nullptr if there is one split, whose task writes dq itself.
inline float* take_partials(Arena& arena, const BackwardPlan& plan, const Problem& p) {
  return plan.splits > 1 ? arena.take<float>(plan.heads_per_wave * partial_floats(plan, p)) : nullptr;
}

}  // namespace flash_attn::cpu
