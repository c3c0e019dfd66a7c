// Plan: how a Problem is cut into tasks. A pure function of (Problem, kernels, workers). What a result's bits depend on
// (groups of rows, splits of keys) is one of (Problem, kernels) alone, so that they are the same for any number of
// threads; how many groups of one head a task takes up is not such a thing.
//
// The rows of a key head are the queries of its heads, one head after the other: row r is query r % seqlen_q of head
// r / seqlen_q of the group. They share packed keys, in one of two ways:
//
//   many rows   waves of heads whose packs fit a budget: first all keys of a wave are packed, then tasks attend, each
//               some rows against all keys. A key is packed once and read by several tasks.
//   few rows    they all fit one task, so a task owns its keys: it packs a chunk of them in its own memory (it stays
//               in L2), attends, and goes on to the next. Where heads are few, the keys are split among tasks, and the
//               sums of the splits are merged in their order. A kernel that reads keys where they lie packs none; its
//               tasks take several key heads, whose rows are neighbours in memory.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/problem.hpp"
#include "cpu/kernels.hpp"

namespace flash_attn::cpu {

struct Plan {
  bool own_keys = false;   // few rows
  bool tiny = false;       // not worth waking a second thread
  int64_t rows = 0;        // of a task at most, a multiple of the kernel's group
  int64_t pack_keys = 0;   // of one pack, whole panels: of the longest sequence, or a chunk; taken up at once in place
  int64_t k_bytes = 0;     // of one pack's keys
  int64_t pack_bytes = 0;  // and of its values too
  // many rows
  int64_t rows_shared = 0;     // of a task that takes several heads: their groups span heads, so no worker counts
  int64_t heads_per_wave = 0;  // packed at once
  int64_t waves = 0;
  // few rows
  int64_t heads_per_task = 1;  // key heads
  int64_t splits = 1;
  int64_t keys_per_split = 0;  // whole panels

  int64_t workspace_shared = 0;      // bytes
  int64_t workspace_per_worker = 0;  // bytes
};

/// `width` is Kernels::width.
Plan make_plan(const Problem& problem, const AttendKernel& kernel, int64_t width, int workers);

/// Rows [first, first + rows) of a key head.
struct RowRange {
  int64_t first, rows;
};
/// The tasks of a key head with `group` heads of seqlen_q queries, where rows are many: a run of queries of one head,
/// or whole heads where they are short. Heaviest first under a causal mask (last queries first).
std::vector<RowRange> attend_ranges(const Plan& plan, const AttendKernel& kernel, int64_t group, int64_t seqlen_q);

/// The backward: tasks are (sequence, key head, split of its keys). Splits are made where heads are few; each costs a
/// partial dq, so a wave holds as many heads as a budget allows.
///
/// An element of a dbias that is broadcast is a sum, added to where it lies; any other is written once. Tasks of one
/// split whose sums meet, of several sequences or heads, have the same owner and run one after the other, so that sums
/// need no memory and have one order.
struct BackwardPlan {
  int64_t rows = 0;         // taken up at a time, whole groups
  int64_t query_bytes = 0;  // of their packs, as of the next for either kernel
  int64_t splits = 1;
  int64_t keys_per_split = 0;  // whole panels of either kernel; whole blocks if there are several splits
  int64_t key_bytes = 0;       // of a split
  int64_t scratch = 0;         // bytes
  int64_t splits_at_once = 1;  // that a task takes up, for queries packed once
  bool chained = false;        // a task has all splits of a head, and adds up one dq
  int64_t heads_per_wave = 0;
  int64_t workspace_shared = 0;      // bytes
  int64_t workspace_per_worker = 0;  // bytes
};

/// `kernel` is the one of the dtype; special rows take kernels.backward_any.
BackwardPlan make_backward_plan(const Problem& problem, const Kernels& kernels, const BackwardKernel& kernel,
                                int workers);

/// Splits [first, last) of a head of a wave.
struct SplitRange {
  int64_t head, first, last;
};
/// The tasks of a wave of `heads`, in the order to start them: the more are left, the more splits has the next.
std::vector<SplitRange> backward_ranges(const BackwardPlan& plan, int64_t heads, int workers);

/// Whether elements of dbias are sums, of several sequences, heads or rows.
bool dbias_sums(const Problem& problem);

/// Whose elements of dbias key head hk of sequence b adds to. Without such sums, every head has its own.
int64_t dbias_owner(const Problem& problem, int64_t b, int64_t hk);

std::string describe(const Plan& plan, const Kernels& kernels, const AttendKernel& kernel);
std::string describe(const BackwardPlan& plan, const Kernels& kernels, const BackwardKernel& kernel);

}  // namespace flash_attn::cpu
