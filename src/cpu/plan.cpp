#include "cpu/plan.hpp"

#include <algorithm>

#include "cpu/arena.hpp"
#include "cpu/driver.hpp"

namespace flash_attn::cpu {

// Packs of one wave. Large enough that barriers between waves are rare, small enough to stay in an L3.
constexpr int64_t kWaveBytes = int64_t{16} << 20;
// Rows of a task: each packed key is read once per task from L3, so more rows mean less traffic (8 d bytes a key for
// 4 d rows FLOPs: with two FMAs a cycle 192 rows need 0.7 bytes a cycle, and 768 a quarter of that). q, o and the
// statistics of the rows should share an L2 with a block of keys, and a wave should end at once for all workers.
constexpr int64_t kMaxRows = 768;
constexpr int64_t kTasksPerWorker = 8;
// The same where a task takes several heads, and where workers do not count. At a time in the backward.
constexpr int64_t kMaxRowsShared = 192;
constexpr int64_t kEnoughTasks = 24;
// Few rows: q and o of all of them, and a chunk of keys, share an L2. A task that owns its keys packs them for its rows
// alone, and there must be tasks enough. A split costs a write and a read of o: 2 / keys of 4 d FLOPs a row.
constexpr int64_t kFewRows = 256;
constexpr int64_t kFewRowsBytes = int64_t{256} << 10;
constexpr int64_t kChunkBytes = int64_t{512} << 10;
constexpr int64_t kEnoughOwners = 16;
// Keys read where they lie wait for memory, and all cores together get most of it. All heads of a few keys are a long
// run of memory, but their q, scores and o should stay in L2. A split costs o twice, 8 d bytes a row, against 4 d bytes
// a key in 16 bits.
constexpr int64_t kEnoughInPlace = 64;
constexpr int64_t kRowsInPlace = 64;
constexpr int64_t kMinKeysInPlace = 128;
constexpr int64_t kKeysInPlace = 1024;
// What one thread does in less time than waking others takes, some 10 us; and what it does in a part of that.
constexpr int64_t kSmallFlops = 2'000'000;
constexpr int64_t kTinyFlops = 300'000;
constexpr int64_t kMinKeysPerSplit = 256;
constexpr int64_t kPartialBytes = int64_t{64} << 20;
// Splits of the backward that share the packs of queries, and heads that leave no worker idle when each has one whole.
constexpr int64_t kSplitsBytes = int64_t{2} << 20;
constexpr int64_t kHeadsPerWorker = 4;

/// Heads of seqlen_q queries that one task of `rows` rows takes whole; 0: a task has rows of one head only.
static int64_t heads_of_task(int64_t rows, int64_t seqlen_q) { return seqlen_q * 2 <= rows ? rows / seqlen_q : 0; }

static int64_t tasks_of_head(int64_t rows, int64_t group, int64_t seqlen_q) {
  const int64_t whole = heads_of_task(rows, seqlen_q);
  return whole > 0 ? divide_up(group, whole) : group * divide_up(seqlen_q, rows);
}

static void plan_packs(Plan& plan, const Problem& p, const AttendKernel& kernel) {
  plan.k_bytes = static_cast<int64_t>(Arena::padded<char>(kernel.k_bytes(plan.pack_keys, p.headdim)));
  plan.pack_bytes =
      plan.k_bytes + static_cast<int64_t>(Arena::padded<char>(kernel.v_bytes(plan.pack_keys, p.headdim_v)));
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
  plan_packs(plan, p, kernel);
  plan.heads_per_wave = std::clamp<int64_t>(kWaveBytes / std::max<int64_t>(plan.pack_bytes, 1), 1, heads);
  plan.waves = divide_up(heads, plan.heads_per_wave);

  plan.rows_shared = round_up(std::min(kMaxRowsShared, seqlen_q * p.group()), kernel.group);
  while (plan.rows_shared > 2 * kernel.group &&
         heads * tasks_of_head(plan.rows_shared, p.group(), seqlen_q) < kEnoughTasks)
    plan.rows_shared -= kernel.group;
  plan.rows = plan.rows_shared;
  if (heads_of_task(plan.rows_shared, seqlen_q) == 0) {
    const int64_t rows = std::min({kMaxRows, seqlen_q, fair_rows(plan, p, workers)});
    plan.rows = std::max(plan.rows_shared, round_up(rows, kernel.group));
  }
}

static void plan_few_rows(Plan& plan, const Problem& p, const AttendKernel& kernel) {
  plan.rows = round_up(std::max<int64_t>(p.max_seqlen_q * p.group(), 1), kernel.group);
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
    const int64_t block_bytes = kernel.k_bytes(kernel.block, p.headdim) + kernel.v_bytes(kernel.block, p.headdim_v);
    chunk = std::max<int64_t>(1, kChunkBytes / std::max<int64_t>(block_bytes, 1)) * kernel.block;
  }
  plan.pack_keys = std::min(chunk, plan.keys_per_split);
  if (!kernel.attend_in_place) plan_packs(plan, p, kernel);
}

/// Bytes of the softmax sums of `rows` rows, as take_sums lays them out.
static int64_t sums_bytes(int64_t rows, int64_t headdim_v, int64_t width) {
  return static_cast<int64_t>(Arena::padded<float>(rows * round_up(headdim_v, width)) +
                              Arena::padded<float>(rows * width) + Arena::padded<float>(rows));
}

Plan make_plan(const Problem& p, const AttendKernel& kernel, int64_t width, int workers) {
  Plan plan;
  const int64_t heads = std::max<int64_t>(p.batch * p.nheads_k, 1), all_rows = p.max_seqlen_q * p.group();
  const int64_t most_splits = std::max<int64_t>(1, p.max_seqlen_k / kMinKeysPerSplit);
  const double flops =
      2.0 * static_cast<double>(heads * all_rows) * static_cast<double>(p.max_seqlen_k * (p.headdim + p.headdim_v));
  plan.tiny = flops <= kTinyFlops;
  plan.own_keys =
      kernel.attend_in_place || (all_rows <= kFewRows && 4 * all_rows * (p.headdim + p.headdim_v) <= kFewRowsBytes &&
                                 (heads * most_splits >= kEnoughOwners || flops <= kSmallFlops));
  if (plan.own_keys)
    plan_few_rows(plan, p, kernel);
  else
    plan_many_rows(plan, p, kernel, workers);

  const auto special_bytes = [&](int64_t packs) {
    return static_cast<int64_t>(Arena::padded<uint8_t>(packs * (plan.pack_keys / kernel.panel)));
  };
  if (plan.own_keys) {
    plan.workspace_per_worker = kernel.attend_in_place
                                    ? static_cast<int64_t>(2 * Arena::padded<const char*>(plan.pack_keys))
                                    : plan.pack_bytes + special_bytes(1);
    if (plan.splits > 1) plan.workspace_shared = heads * plan.splits * sums_bytes(plan.rows, p.headdim_v, width);
  } else {
    plan.workspace_shared = static_cast<int64_t>(Arena::padded<char>(plan.heads_per_wave * plan.pack_bytes)) +
                            special_bytes(plan.heads_per_wave);
  }
  plan.workspace_per_worker +=
      plan.heads_per_task *
      (sums_bytes(plan.rows, p.headdim_v, width) +
       static_cast<int64_t>(Arena::padded<char>(kernel.q_bytes(plan.rows, p.headdim)) +
                            Arena::padded<char>(kernel.scratch) + 3 * Arena::padded<float>(plan.rows) +
                            3 * Arena::padded<int64_t>(plan.rows) + 3 * Arena::padded<const char*>(plan.rows) +
                            Arena::padded<DropoutRow>(plan.rows)));
  return plan;
}

std::vector<RowRange> attend_ranges(const Plan& plan, const AttendKernel& kernel, int64_t group, int64_t seqlen_q) {
  std::vector<RowRange> ranges;
  if (seqlen_q <= 0) return ranges;
  if (const int64_t whole = heads_of_task(plan.rows_shared, seqlen_q); whole > 0) {
    for (int64_t h = 0; h < group; h += whole) ranges.push_back({h * seqlen_q, std::min(whole, group - h) * seqlen_q});
    return ranges;
  }
  const int64_t rows = round_up(divide_up(seqlen_q, divide_up(seqlen_q, plan.rows)), kernel.group);  // about the same
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
  plan.rows = round_up(std::clamp<int64_t>(p.max_seqlen_q, 1, kMaxRowsShared), kernel.group);
  const int64_t heads = std::max<int64_t>(p.batch * p.nheads_k, 1);
  const int64_t wanted = divide_up(kEnoughTasks, std::max<int64_t>(dbias_owners(p), 1));
  const bool split = wanted > 1 && p.max_seqlen_k > kernel.block;
  plan.keys_per_split =
      round_up(divide_up(p.max_seqlen_k, split ? wanted : 1), split ? kernel.block : std::max(kernel.panel, any.panel));
  plan.splits = std::max<int64_t>(1, divide_up(p.max_seqlen_k, std::max<int64_t>(plan.keys_per_split, 1)));

  const int64_t keys = plan.keys_per_split, rows = plan.rows;
  for (const BackwardKernel* x : {&kernel, &any}) {
    plan.key_bytes = std::max(plan.key_bytes, x->key_bytes(keys, p.headdim, p.headdim_v));
    plan.query_bytes = std::max(plan.query_bytes, x->query_bytes(rows, p.headdim, p.headdim_v));
    plan.scratch = std::max(plan.scratch, x->scratch);
  }
  const int64_t d = round_up(p.headdim, kernels.width), dv = round_up(p.headdim_v, kernels.width);
  const auto bytes = [](int64_t n) { return static_cast<int64_t>(Arena::padded<char>(n)); };
  const auto floats = [](int64_t n) { return static_cast<int64_t>(Arena::padded<float>(n)); };
  const int64_t split_bytes = bytes(plan.key_bytes) + bytes(keys) + floats(keys * d) + floats(keys * dv);
  const bool turns = p.dbias.present() && dbias_sums(p);
  plan.chained = plan.splits > 1 && (workers == 1 || dbias_owners(p) >= workers * kHeadsPerWorker);
  plan.splits_at_once = turns && !plan.chained
                            ? 1
                            : std::clamp<int64_t>(kSplitsBytes / std::max<int64_t>(split_bytes, 1), 1, plan.splits);

  const int64_t partial = (plan.chained ? 1 : plan.splits) * p.group() * p.max_seqlen_q * d;
  plan.heads_per_wave =
      plan.splits == 1 ? heads : std::clamp<int64_t>(kPartialBytes / std::max<int64_t>(4 * partial, 1), 1, heads);
  if (plan.splits > 1)
    plan.workspace_shared = static_cast<int64_t>(Arena::padded<float>(plan.heads_per_wave * partial));
  plan.workspace_per_worker = plan.splits_at_once * split_bytes + bytes(plan.query_bytes) + bytes(plan.scratch) +
                              bytes(rows) + floats(kernel.sum_rows ? keys * std::max(d, dv) : 0) + floats(rows * d) +
                              3 * floats(rows) +
                              static_cast<int64_t>(3 * Arena::padded<int64_t>(rows) + Arena::padded<const char*>(rows) +
                                                   Arena::padded<float*>(rows) + Arena::padded<DropoutRow>(rows));
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
         std::to_string(kernel.group) + " rows x " + std::to_string(kernel.block) + " keys, tasks of " +
         std::to_string(plan.rows) + " rows" +
         (plan.heads_per_task > 1 ? " of " + std::to_string(plan.heads_per_task) + " key heads, " : ", ") + keys +
         ", workspace " + kib(plan.workspace_shared) + " + " + kib(plan.workspace_per_worker) + " a worker";
}

std::string describe(const BackwardPlan& plan, const Kernels& k, const BackwardKernel& kernel) {
  return std::string("isa ") + k.name + ", products in " + kernel.name + ", score tiles of " +
         std::to_string(kernel.group) + " rows x " + std::to_string(kernel.block) + " keys, " +
         std::to_string(plan.splits) + " key splits of " + std::to_string(plan.keys_per_split) + " keys a head, " +
         std::to_string(plan.splits_at_once) + " at once, waves of " + std::to_string(plan.heads_per_wave) +
         " heads, workspace " + kib(plan.workspace_shared) + " + " + kib(plan.workspace_per_worker) + " a worker";
}

}  // namespace flash_attn::cpu
