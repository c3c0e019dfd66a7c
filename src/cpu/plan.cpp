#include "cpu/plan.hpp"

#include <algorithm>

#include "cpu/arena.hpp"
#include "cpu/driver.hpp"

namespace flash_attn::cpu {

// Packed panels of one wave. Large enough that barriers between waves are rare, small enough to stay in an L3.
constexpr int64_t kWaveBytes = int64_t{16} << 20;
// Rows of a task: each packed key is read once per task from L2 or L3, so more rows mean less traffic (8 d bytes a key
// for 4 d rows FLOPs: 192 rows need 0.7 bytes a cycle); q, o and the statistics of the rows must leave room in L2.
constexpr int64_t kMaxRows = 192;
constexpr int64_t kEnoughTasks = 24;
// A split of the backward packs its keys and loads every query that sees them: it must have keys enough to pay for it.
constexpr int64_t kMinKeysPerSplit = 256;
constexpr int64_t kPartialBytes = int64_t{64} << 20;

Plan make_plan(const Problem& p, const AttendKernel& kernel, int64_t width) {
  Plan plan;
  const int64_t heads = p.batch * p.nheads_k;
  const int64_t all_rows = p.max_seqlen_q * p.group();
  plan.rows = std::min(round_up(kMaxRows, kernel.group), round_up(std::max<int64_t>(all_rows, 1), kernel.group));
  while (plan.rows > 2 * kernel.group && heads * ((all_rows + plan.rows - 1) / plan.rows) < kEnoughTasks)
    plan.rows -= kernel.group;

  plan.keys_padded = round_up(p.max_seqlen_k, kernel.panel);
  plan.k_bytes = static_cast<int64_t>(Arena::padded<char>(kernel.k_bytes(plan.keys_padded, p.headdim)));
  plan.pack_bytes =
      plan.k_bytes + static_cast<int64_t>(Arena::padded<char>(kernel.v_bytes(plan.keys_padded, p.headdim_v)));
  plan.heads_per_wave =
      std::clamp<int64_t>(kWaveBytes / std::max<int64_t>(plan.pack_bytes, 1), 1, std::max<int64_t>(heads, 1));
  plan.waves = (heads + plan.heads_per_wave - 1) / plan.heads_per_wave;

  plan.workspace_shared =
      static_cast<int64_t>(Arena::padded<char>(plan.heads_per_wave * plan.pack_bytes) +
                           Arena::padded<uint8_t>(plan.heads_per_wave * (plan.keys_padded / kernel.panel)));
  plan.workspace_per_worker = static_cast<int64_t>(
      Arena::padded<char>(kernel.q_bytes(plan.rows, p.headdim)) +
      Arena::padded<float>(plan.rows * round_up(p.headdim_v, width)) + Arena::padded<float>(plan.rows * width) +
      4 * Arena::padded<float>(plan.rows) + 3 * Arena::padded<int64_t>(plan.rows) +
      2 * Arena::padded<const char*>(plan.rows) + Arena::padded<char>(kernel.scratch));
  return plan;
}

std::vector<AttendRange> attend_ranges(const Problem& p, const Plan& plan, int64_t hk, int64_t seqlen_q) {
  std::vector<AttendRange> ranges;
  const int64_t first = hk * p.group(), end = first + p.group();
  if (seqlen_q <= 0) return ranges;
  if (seqlen_q * 2 <= plan.rows) {
    const int64_t heads = plan.rows / seqlen_q;
    for (int64_t h = first; h < end; h += heads) ranges.push_back({h, std::min(heads, end - h), 0, seqlen_q});
    return ranges;
  }
  const int64_t last = (seqlen_q - 1) / plan.rows * plan.rows;
  for (int64_t row = last; row >= 0; row -= plan.rows)
    for (int64_t h = first; h < end; ++h) ranges.push_back({h, 1, row, std::min(plan.rows, seqlen_q - row)});
  return ranges;
}

BackwardPlan make_backward_plan(const Problem& p, const Kernels& kernels) {
  BackwardPlan plan;
  const int64_t heads = std::max<int64_t>(p.batch * p.nheads_k, 1);
  const int64_t wanted = (kEnoughTasks + heads - 1) / heads;
  plan.splits = std::clamp<int64_t>(p.max_seqlen_k / kMinKeysPerSplit, 1, wanted);
  plan.keys_per_split = round_up((p.max_seqlen_k + plan.splits - 1) / plan.splits, kernels.panel);
  if (plan.keys_per_split > 0)
    plan.splits = std::max<int64_t>(1, (p.max_seqlen_k + plan.keys_per_split - 1) / plan.keys_per_split);

  const int64_t d = round_up(p.headdim, kernels.width), dv = round_up(p.headdim_v, kernels.width);
  const int64_t partial = plan.splits * p.group() * p.max_seqlen_q * d;
  plan.heads_per_wave =
      plan.splits == 1 ? heads : std::clamp<int64_t>(kPartialBytes / std::max<int64_t>(4 * partial, 1), 1, heads);
  if (plan.splits > 1)
    plan.workspace_shared = static_cast<int64_t>(Arena::padded<float>(plan.heads_per_wave * partial));

  const int64_t keys = plan.keys_per_split, rows = p.max_seqlen_q;
  const auto floats = [](int64_t n) { return static_cast<int64_t>(Arena::padded<float>(n)); };
  plan.workspace_per_worker =
      floats(keys * p.headdim) + floats(keys * p.headdim_v) + 2 * floats(keys * d) + floats(keys * dv) +
      2 * floats(rows * d) + floats(rows * dv) + 3 * floats(rows) + floats(kernels.backward_scratch) +
      static_cast<int64_t>(3 * Arena::padded<int64_t>(rows) + Arena::padded<uint8_t>(keys / kernels.panel) +
                           Arena::padded<uint8_t>(rows / kernels.backward_group + 1));
  return plan;
}

static std::string kib(int64_t bytes) { return std::to_string(bytes >> 10) + " KiB"; }

std::string describe(const Plan& plan, const Kernels& k, const AttendKernel& kernel) {
  return std::string("isa ") + k.name + ", products in " + kernel.name + ", score tiles of " +
         std::to_string(kernel.group) + " rows x " + std::to_string(kernel.block) + " keys, tasks of " +
         std::to_string(plan.rows) + " rows, " + std::to_string(plan.waves) +
         (plan.waves == 1 ? " wave of " : " waves of ") + std::to_string(plan.heads_per_wave) +
         " packed heads, workspace " + kib(plan.workspace_shared) + " + " + kib(plan.workspace_per_worker) +
         " a worker";
}

std::string describe(const BackwardPlan& plan, const Kernels& k) {
  return std::string("isa ") + k.name + ", " + std::to_string(plan.splits) + " key splits of " +
         std::to_string(plan.keys_per_split) + " keys a head, waves of " + std::to_string(plan.heads_per_wave) +
         " heads, workspace " + kib(plan.workspace_shared) + " + " + kib(plan.workspace_per_worker) + " a worker";
}

}  // namespace flash_attn::cpu
