// Plan: how a Problem is cut into tasks. A pure function of (Problem, kernels, workers).
//
// The bits of a result depend on two things in it: which rows share a score tile (its keys are those that one of its
// rows sees, and a row's maximum is raised once a tile), and which keys make a split. Both are functions of (Problem,
// kernels) alone, so results are the same for any number of threads. How many tiles of rows a task takes up may depend
// on the workers: 4096 queries are 6 tasks of 768 rows for one worker and 24 of 170 for sixteen.
//
// Words:
//   group     the query heads that share a key head: 32 query heads over 8 key heads are groups of 4
//   tile      rows x keys whose scores are computed at once (12 x 512 in fp32): they stay in L1
//   panel     keys that are packed at once, side by side (64 in fp32); strip: the same for columns of v
//   pack      a head's keys and values, or a chunk of them, in the kernel's layout
//   chunk     keys that a task packs before it attends to them, where it owns its keys; they stay in its L2
//   split     keys of a head whose sums are made by one task; the sums of a head's splits are added afterwards
//   wave      heads that are packed (forward) or summed (backward) at once, so that memory is bounded
//   team      neighbouring key heads that a task takes up together, where keys are read in place
//   special   rows with an inf or a NaN, or numbers that a kernel cannot split into parts (kernels.hpp)
//
// The rows of a key head are the queries of its group, one head after the other: with 100 queries row 250 is query 50
// of the third head. They share packed keys, in one of two ways:
//
//   many rows   for each wave, first all keys are packed, then tasks attend, each some rows against all keys of their
//               head. A key is packed once and read by several tasks.
//   few rows    all rows of a key head fit one task, so the task owns its keys: it packs a chunk in its own memory,
//               attends, and goes on to the next. Where heads are few, their keys are split among tasks, and the sums
//               of the splits are merged in the order of the keys. A kernel that reads keys in place packs none.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/problem.hpp"
#include "cpu/kernels.hpp"

namespace flash_attn::cpu {

struct Plan {
  int64_t headdim = 0, headdim_v = 0;
  int64_t width = 0;  // floats in a vector
  int64_t ldo = 0;    // headdim_v padded to the width

  int workers = 1;        // that have a task; 1 also where waking another takes longer than all of the work
  bool own_keys = false;  // few rows
  int64_t rows = 0;       // of a task at most, a multiple of the kernel's tile_rows
  int64_t pack_keys = 0;  // of one pack, whole panels: of the longest sequence, or a chunk; taken up at once in place
  // many rows
  int64_t rows_shared = 0;     // of a task that takes several heads: its tiles span heads, so no worker counts
  int64_t heads_per_wave = 0;  // packed at once
  int64_t waves = 0;
  // few rows
  int64_t heads_per_task = 1;  // key heads
  int64_t splits = 1;
  int64_t keys_per_split = 0;  // whole panels
  bool asks_ahead = false;     // for the rows of the next head, while it attends to this one

  int64_t workspace_shared = 0;      // bytes
  int64_t workspace_per_worker = 0;  // bytes
};

/// `width` is Kernels::width.
Plan make_plan(const Problem& problem, const AttendKernel& kernel, int64_t width, int workers);

/// Keys of a head that a task of packing takes, where rows are many: about 2^15 elements, 5 us. All workers wait for
/// the last [9], so few heads must do for many.
int64_t packed_at_once(const AttendKernel& kernel, const Problem& problem);

/// Rows [first, first + rows) of a key head.
struct RowRange {
  int64_t first, rows;
};
/// The tasks of a key head with a group of `group` heads of seqlen_q queries, where rows are many: a run of queries of
/// one head, or whole heads where they are short. Heaviest first under a causal mask (last queries first).
std::vector<RowRange> attend_ranges(const Plan& plan, const AttendKernel& kernel, int64_t group, int64_t seqlen_q);

/// The backward: tasks are (sequence, key head, some splits of its keys). One head of 4096 keys makes 22 splits of 192,
/// 64 heads one each. Each split costs a partial dq, so a wave holds as many heads as a budget of memory allows.
///
/// An element of a dbias that is broadcast is a sum, added to where it lies; any other is written once. Tasks of one
/// split whose sums meet, of several sequences or heads, have the same owner and run one after the other, so that sums
/// need no memory and have one order.
struct BackwardPlan {
  int64_t ldq = 0, ldo = 0;  // headdim and headdim_v, padded to the width
  int workers = 1;           // that have a task
  int64_t rows = 0;          // taken up at a time, whole tiles
  int64_t query_bytes = 0;   // of the packs of q and dout, for whichever kernel needs more; so are the next two
  int64_t splits = 1;
  int64_t keys_per_split = 0;  // whole panels of either kernel; whole blocks if there are several splits
  int64_t key_bytes = 0;       // of a split
  int64_t scratch = 0;         // bytes
  bool transposes = false;     // the kernel sums dk and dv in a layout of its own
  int64_t splits_at_once = 1;  // that a task takes up, for queries packed once
  bool chained = false;        // a task has all splits of a head, and adds up one dq
  bool asks_ahead = false;     // as above
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
