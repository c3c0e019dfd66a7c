// Plan: how a Problem is cut into tasks. A pure function of (Problem, kernels): never of the number of threads, so
// that results are bitwise the same for any.
//
//   heads (b, hk)  ->  waves of heads whose packed keys and values fit a budget
//   a wave         ->  pack tasks (chunks of keys), then attend tasks (rows of queries)
//
// An attend task has up to `rows` rows of one key head: a run of queries of one head, or, where sequences are short,
// whole sequences of several heads of the group, so that short queries share the packed keys.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/problem.hpp"
#include "cpu/kernels.hpp"

namespace flash_attn::cpu {

struct Plan {
  int64_t rows = 0;            // of an attend task, a multiple of the kernel's group
  int64_t keys_padded = 0;     // of the longest sequence, to whole panels
  int64_t k_bytes = 0;         // of one head's packed keys
  int64_t pack_bytes = 0;      // of one head: keys and values
  int64_t heads_per_wave = 0;  // packed at once
  int64_t waves = 0;
  int64_t workspace_shared = 0;      // bytes
  int64_t workspace_per_worker = 0;  // bytes
};

/// `width` is Kernels::width.
Plan make_plan(const Problem& problem, const AttendKernel& kernel, int64_t width);

/// Rows [row, row + rows) of each of `heads` heads from `head`, of one sequence and one key head.
struct AttendRange {
  int64_t head, heads, row, rows;
};
/// The tasks of key head hk of a sequence with seqlen_q queries: heaviest first under a causal mask (last rows first).
std::vector<AttendRange> attend_ranges(const Problem& problem, const Plan& plan, int64_t hk, int64_t seqlen_q);

/// The backward: tasks are (sequence, key head, split of its keys). Splits are made where heads are few; each costs a
/// partial dq, so a wave holds as many heads as a budget allows.
struct BackwardPlan {
  int64_t splits = 1;
  int64_t keys_per_split = 0;  // whole panels
  int64_t heads_per_wave = 0;
  int64_t workspace_shared = 0;      // bytes
  int64_t workspace_per_worker = 0;  // bytes
};

BackwardPlan make_backward_plan(const Problem& problem, const Kernels& kernels);

std::string describe(const Plan& plan, const Kernels& kernels, const AttendKernel& kernel);
std::string describe(const BackwardPlan& plan, const Kernels& kernels);

}  // namespace flash_attn::cpu
