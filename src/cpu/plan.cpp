#include "cpu/plan.hpp"

#include <algorithm>

#include "cpu/arena.hpp"
#include "cpu/backward_worker.hpp"
#include "cpu/few_rows.hpp"
#include "cpu/many_rows.hpp"
#include "cpu/rounding.hpp"

namespace flash_attn::cpu {

// What the plan is made of. [n]: the entry of docs/performance/ that measured it. "Counted": by what stands
// there.
//
// clang-format off
//                                               unit     of what, and the evidence
// Many rows
constexpr int64_t kWaveBytes       = 16 << 20;   // bytes   packs of a wave. Counted: they stay in an L3
constexpr int64_t kMaxRows         = 768;        // rows    of a task [39]: each task reads all packed keys from L3
constexpr int64_t kTasksPerWorker  = 8;          // tasks   of a wave [39]: all workers end at about the same time
constexpr int64_t kMaxRowsShared   = 192;        // rows    of a task of several heads; of the backward [25, 41]
constexpr int64_t kEnoughTasks     = 24;         // tasks   where workers must not count [11]
// Few rows
constexpr int64_t kFewRows         = 256;        // rows    of a key head [11]
constexpr int64_t kFewRowsBytes    = 256 << 10;  // bytes   q and o of them. Counted: half of an L2 of 512 KiB
constexpr int64_t kChunkBytes      = 512 << 10;  // bytes   a chunk's packs [11]. Counted: with q, o in L2 (1 MiB)
constexpr int64_t kEnoughOwners    = 16;         // tasks   that splits are made for [12]
constexpr int64_t kMinKeysPerSplit = 256;        // keys    [12]. Counted: merging costs 2 / keys of the products
constexpr int64_t kAheadBytes      = 512 << 10;  // bytes   asked for ahead [46]. Counted: in L2 beside the workspace
// Keys in place
constexpr int64_t kEnoughInPlace   = 64;         // tasks   that splits are made for [34]: all cores wait for memory
constexpr int64_t kRowsInPlace     = 64;         // rows    of a team [34]: q, scores and o stay in L2
constexpr int64_t kMinKeysInPlace  = 128;        // keys    of a split. Counted: o, moved twice, is 1 / 64 of the keys
constexpr int64_t kKeysInPlace     = 1024;       // keys    looked up at once: 16 KiB of addresses
// Both passes
constexpr double kSmallFlops       = 2e6;        // FLOPs   below, no splits [38]: 10 us, as long as waking others takes
constexpr double kTinyFlops        = 3e5;        // FLOPs   below, one worker [38]
// Backward
constexpr int64_t kPartialBytes    = 64 << 20;   // bytes   partial dq of a wave: memory does not grow with the heads
constexpr int64_t kSplitsBytes     = 2 << 20;    // bytes   of the splits that a task takes up at once [42]
constexpr int64_t kHeadsPerWorker  = 4;          // heads   that leave no worker idle when each takes whole ones [42]
// clang-format on

/// Heads of seqlen_q queries that one task of `rows` rows takes whole; 0: a task has rows of one head only.
static int64_t heads_of_task(int64_t rows, int64_t seqlen_q) { return seqlen_q * 2 <= rows ? rows / seqlen_q : 0; }

static int64_t tasks_of_head(int64_t rows, int64_t group, int64_t seqlen_q) {
  const int64_t whole = heads_of_task(rows, seqlen_q);
  return whole > 0 ? divide_up(group, whole) : group * divide_up(seqlen_q, rows);
}

int64_t packed_at_once(const AttendKernel& kernel, const Problem& p) {
  constexpr int64_t kElements = int64_t{1} << 15;
  return std::max<int64_t>(1, kElements / (kernel.panel * std::max<int64_t>(p.headdim + p.headdim_v, 1))) *
         kernel.panel;
}

/// Rows with which a task of the longest sequence is a worker's share of a wave, cut in kTasksPerWorker.
static int64_t fair_rows(const Plan& plan, const Problem& p, int workers) {
  double scores = 0;  // of all heads of queries
  for (int64_t b = 0; b < p.batch; ++b) {
    const Sequence s = p.sequences.at(b);
    scores += static_cast<double>(p.nheads) * static_cast<double>(s.seqlen_q) * static_cast<double>(s.seqlen_k);
  }
  const int64_t heads = std::max<int64_t>(p.batch * p.nheads_k, 1),
                tasks = workers == 1 ? 1 : workers * kTasksPerWorker;
  const double of_wave = scores * static_cast<double>(plan.heads_per_wave) / static_cast<double>(heads);
  return static_cast<int64_t>(of_wave / static_cast<double>(tasks * std::max<int64_t>(p.max_seqlen_k, 1)));
}

static void plan_many_rows(Plan& plan, const Problem& p, const AttendKernel& kernel, int workers) {
  const int64_t heads = std::max<int64_t>(p.batch * p.nheads_k, 1), seqlen_q = std::max<int64_t>(p.max_seqlen_q, 1);
  plan.pack_keys = round_up(p.max_seqlen_k, kernel.panel);
  const int64_t pack_bytes = bytes_taken([&](Arena& arena) { Pack::take(arena, plan, kernel); });
  plan.heads_per_wave = std::clamp<int64_t>(kWaveBytes / std::max<int64_t>(pack_bytes, 1), 1, heads);
  plan.waves = divide_up(heads, plan.heads_per_wave);

  plan.rows_shared = round_up(std::min(kMaxRowsShared, seqlen_q * p.group()), kernel.tile_rows);
  while (plan.rows_shared > 2 * kernel.tile_rows &&
         heads * tasks_of_head(plan.rows_shared, p.group(), seqlen_q) < kEnoughTasks)
    plan.rows_shared -= kernel.tile_rows;
  plan.rows = plan.rows_shared;
  if (heads_of_task(plan.rows_shared, seqlen_q) == 0) {
    const int64_t rows = std::min({kMaxRows, seqlen_q, fair_rows(plan, p, workers)});
    plan.rows = std::max(plan.rows_shared, round_up(rows, kernel.tile_rows));
  }
  const int64_t tasks = plan.heads_per_wave * tasks_of_head(plan.rows, p.group(), seqlen_q);
  const int64_t packing = plan.heads_per_wave * divide_up(p.max_seqlen_k, packed_at_once(kernel, p));
  plan.workers = static_cast<int>(std::clamp<int64_t>(std::max(tasks, packing), 1, workers));
}

static void plan_few_rows(Plan& plan, const Problem& p, const AttendKernel& kernel, int workers) {
  plan.rows = round_up(std::max<int64_t>(p.max_seqlen_q * p.group(), 1), kernel.tile_rows);
  if (kernel.attend_in_place)
    plan.heads_per_task = std::clamp<int64_t>(kRowsInPlace / plan.rows, 1, std::max<int64_t>(p.nheads_k, 1));
  const int64_t enough = kernel.attend_in_place ? kEnoughInPlace : kEnoughOwners;
  const int64_t least = kernel.attend_in_place ? kMinKeysInPlace : kMinKeysPerSplit;
  const int64_t teams = std::max<int64_t>(p.batch * divide_up(p.nheads_k, plan.heads_per_task), 1);
  plan.splits = std::clamp<int64_t>(divide_up(enough, teams), 1, std::max<int64_t>(1, p.max_seqlen_k / least));
  plan.keys_per_split = round_up(divide_up(p.max_seqlen_k, plan.splits), plan.splits > 1 ? least : kernel.panel);
  plan.splits = std::max<int64_t>(1, divide_up(p.max_seqlen_k, std::max<int64_t>(plan.keys_per_split, 1)));
  int64_t chunk = kKeysInPlace;
  if (!kernel.attend_in_place) {
    const int64_t block_bytes =
        kernel.k_bytes(kernel.tile_keys, p.headdim) + kernel.v_bytes(kernel.tile_keys, p.headdim_v);
    chunk = std::max<int64_t>(1, kChunkBytes / std::max<int64_t>(block_bytes, 1)) * kernel.tile_keys;
  }
  plan.pack_keys = std::min(chunk, plan.keys_per_split);
  plan.workers = static_cast<int>(std::clamp<int64_t>(teams * plan.splits, 1, workers));
  const int64_t head_rows = p.max_seqlen_q * p.group() + p.max_seqlen_k;  // q and out, k and v
  plan.asks_ahead = !kernel.attend_in_place && p.max_seqlen_k <= plan.pack_keys &&
                    head_rows * (p.headdim + p.headdim_v) * static_cast<int64_t>(size_of(p.dtype)) <= kAheadBytes;
}

Plan make_plan(const Problem& p, const AttendKernel& kernel, int64_t width, int workers) {
  Plan plan;
  const int64_t heads = std::max<int64_t>(p.batch * p.nheads_k, 1), all_rows = p.max_seqlen_q * p.group();
  const int64_t most_splits = std::max<int64_t>(1, p.max_seqlen_k / kMinKeysPerSplit);
  const double flops =
      2.0 * static_cast<double>(heads * all_rows) * static_cast<double>(p.max_seqlen_k * (p.headdim + p.headdim_v));
  plan.headdim = p.headdim, plan.headdim_v = p.headdim_v, plan.width = width, plan.ldo = round_up(p.headdim_v, width);
  plan.own_keys =
      kernel.attend_in_place || (all_rows <= kFewRows && 4 * all_rows * (p.headdim + p.headdim_v) <= kFewRowsBytes &&
                                 (heads * most_splits >= kEnoughOwners || flops <= kSmallFlops));
  if (plan.own_keys) {
    plan_few_rows(plan, p, kernel, workers);
    plan.workspace_shared =
        bytes_taken([&](Arena& arena) { FewRows::take_split_sums(arena, plan, p.batch * p.nheads_k); });
    plan.workspace_per_worker = bytes_taken([&](Arena& arena) { FewRows::Worker(arena, plan, kernel); });
  } else {
    plan_many_rows(plan, p, kernel, workers);
    plan.workspace_shared = bytes_taken([&](Arena& arena) { ManyRows::take_packs(arena, plan, kernel); });
    plan.workspace_per_worker = bytes_taken([&](Arena& arena) { ManyRows::Worker(arena, plan, kernel); });
  }
  if (flops <= kTinyFlops) plan.workers = 1;
  return plan;
}

std::vector<RowRange> attend_ranges(const Plan& plan, const AttendKernel& kernel, int64_t group, int64_t seqlen_q) {
  std::vector<RowRange> ranges;
  if (seqlen_q <= 0) return ranges;
  if (const int64_t whole = heads_of_task(plan.rows_shared, seqlen_q); whole > 0) {
    for (int64_t h = 0; h < group; h += whole) ranges.push_back({h * seqlen_q, std::min(whole, group - h) * seqlen_q});
    return ranges;
  }
  const int64_t rows =
      round_up(divide_up(seqlen_q, divide_up(seqlen_q, plan.rows)), kernel.tile_rows);  // about the same
  for (int64_t row = (seqlen_q - 1) / rows * rows; row >= 0; row -= rows)
    for (int64_t h = 0; h < group; ++h) ranges.push_back({h * seqlen_q + row, std::min(rows, seqlen_q - row)});
  return ranges;
}

static bool sums_over(const Problem& p, int dim, int64_t extent) {
  return p.dbias.present() && p.scores.bias_shape[dim] < extent;
}

bool dbias_sums(const Problem& p) {
  return sums_over(p, 0, p.batch) || sums_over(p, 1, p.nheads) || sums_over(p, 2, p.max_seqlen_q);
}

int64_t dbias_owner(const Problem& p, int64_t b, int64_t hk) {
  return (sums_over(p, 0, p.batch) ? 0 : b) * p.nheads_k + (sums_over(p, 1, p.nheads) ? 0 : hk);
}

static int64_t dbias_owners(const Problem& p) {
  return (sums_over(p, 0, p.batch) ? 1 : p.batch) * (sums_over(p, 1, p.nheads) ? 1 : p.nheads_k);
}

BackwardPlan make_backward_plan(const Problem& p, const Kernels& kernels, const BackwardKernel& kernel, int workers) {
  const BackwardKernel& any = *kernels.backward_any;
  BackwardPlan plan;
  plan.rows = round_up(std::clamp<int64_t>(p.max_seqlen_q, 1, kMaxRowsShared), kernel.tile_rows);
  const int64_t heads = std::max<int64_t>(p.batch * p.nheads_k, 1);
  const int64_t wanted = divide_up(kEnoughTasks, std::max<int64_t>(dbias_owners(p), 1));
  const bool split = wanted > 1 && p.max_seqlen_k > kernel.tile_keys;
  plan.keys_per_split = round_up(divide_up(p.max_seqlen_k, split ? wanted : 1),
                                 split ? kernel.tile_keys : std::max(kernel.panel, any.panel));
  plan.splits = std::max<int64_t>(1, divide_up(p.max_seqlen_k, std::max<int64_t>(plan.keys_per_split, 1)));

  const int64_t keys = plan.keys_per_split, rows = plan.rows;
  for (const BackwardKernel* x : {&kernel, &any}) {
    plan.key_bytes = std::max(plan.key_bytes, x->key_bytes(keys, p.headdim, p.headdim_v));
    plan.query_bytes = std::max(plan.query_bytes, x->query_bytes(rows, p.headdim, p.headdim_v));
    plan.scratch = std::max(plan.scratch, x->scratch);
  }
  plan.ldq = round_up(p.headdim, kernels.width), plan.ldo = round_up(p.headdim_v, kernels.width);
  plan.transposes = kernel.sum_rows != nullptr;
  const int64_t split_bytes = bytes_taken([&](Arena& arena) { KeySplit(arena, plan, nullptr); });
  const bool turns = p.dbias.present() && dbias_sums(p);
  plan.chained = plan.splits > 1 && (workers == 1 || dbias_owners(p) >= workers * kHeadsPerWorker);
  plan.splits_at_once = turns && !plan.chained
                            ? 1
                            : std::clamp<int64_t>(kSplitsBytes / std::max<int64_t>(split_bytes, 1), 1, plan.splits);

  const int64_t partial = 4 * partial_floats(plan, p);
  plan.heads_per_wave =
      plan.splits == 1 ? heads : std::clamp<int64_t>(kPartialBytes / std::max<int64_t>(partial, 1), 1, heads);
  plan.workspace_shared = bytes_taken([&](Arena& arena) { take_partials(arena, plan, p); });
  plan.workspace_per_worker = bytes_taken([&](Arena& arena) { BackwardWorker(arena, plan); });
  plan.workers = static_cast<int>(std::clamp<int64_t>(plan.heads_per_wave * plan.splits, 1, workers));
  // Read: q, dout, out, k and v. Written: dq, dk and dv.
  const int64_t columns =
      p.max_seqlen_q * (2 * p.headdim + 2 * p.headdim_v) + 2 * p.max_seqlen_k * (p.headdim + p.headdim_v);
  plan.asks_ahead = plan.splits == 1 && p.group() == 1 && p.max_seqlen_q <= plan.rows &&
                    columns * static_cast<int64_t>(size_of(p.dtype)) <= kAheadBytes;
  return plan;
}

std::vector<SplitRange> backward_ranges(const BackwardPlan& plan, int64_t heads, int workers) {
  std::vector<SplitRange> ranges;
  int64_t left = heads * plan.splits;
  for (int64_t head = 0; head < heads; ++head)
    for (int64_t first = 0; first < plan.splits;) {
      const int64_t most = plan.chained ? plan.splits : std::min(plan.splits_at_once, plan.splits - first);
      const int64_t n = plan.chained ? most : std::clamp<int64_t>(left / (2 * workers), 1, most);
      ranges.push_back({head, first, first + n});
      first += n, left -= n;
    }
  return ranges;
}

static std::string kib(int64_t bytes) { return std::to_string(bytes >> 10) + " KiB"; }

std::string describe(const Plan& plan, const Kernels& k, const AttendKernel& kernel) {
  const std::string keys =
      plan.own_keys ? std::to_string(plan.splits) + (plan.splits == 1 ? " split of " : " splits of ") +
                          std::to_string(plan.keys_per_split) + " keys, " +
                          (kernel.attend_in_place ? "read " : "packed ") + std::to_string(plan.pack_keys) + " at a time"
                    : std::to_string(plan.waves) + (plan.waves == 1 ? " wave of " : " waves of ") +
                          std::to_string(plan.heads_per_wave) + " packed heads";
  return std::string("isa ") + k.name + ", products in " + kernel.name + ", score tiles of " +
         std::to_string(kernel.tile_rows) + " rows x " + std::to_string(kernel.tile_keys) + " keys, tasks of " +
         std::to_string(plan.rows) + " rows" +
         (plan.heads_per_task > 1 ? " of " + std::to_string(plan.heads_per_task) + " key heads, " : ", ") + keys +
         ", workspace " + kib(plan.workspace_shared) + " + " + kib(plan.workspace_per_worker) + " a worker";
}

std::string describe(const BackwardPlan& plan, const Kernels& k, const BackwardKernel& kernel) {
  return std::string("isa ") + k.name + ", products in " + kernel.name + ", score tiles of " +
         std::to_string(kernel.tile_rows) + " rows x " + std::to_string(kernel.tile_keys) + " keys, " +
         std::to_string(plan.splits) + " key splits of " + std::to_string(plan.keys_per_split) + " keys a head, " +
         std::to_string(plan.splits_at_once) + " at once, waves of " + std::to_string(plan.heads_per_wave) +
         " heads, workspace " + kib(plan.workspace_shared) + " + " + kib(plan.workspace_per_worker) + " a worker";
}

}  // namespace flash_attn::cpu
