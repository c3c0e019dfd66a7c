#include "cpu/plan.hpp"

#include <algorithm>

#include "cpu/arena.hpp"

namespace flash_attn::cpu {

// Packed panels of one wave. Large enough that barriers between waves are rare, small enough to stay in an L3.
constexpr int64_t kWaveBytes = int64_t{16} << 20;
// Rows of a task: each packed key is read once per task from L2 or L3, so more rows mean less traffic (8 d bytes a key
// for 4 d rows FLOPs: 192 rows need 0.7 bytes a cycle); q, o and the statistics of the rows must leave room in L2.
constexpr int64_t kMaxRows = 192;
constexpr int64_t kEnoughTasks = 32;

static int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

Plan make_plan(const Problem& p, const Kernels& kernels) {
  Plan plan;
  const int64_t heads = p.batch * p.nheads_k;
  const int64_t all_rows = p.max_seqlen_q * p.group();
  plan.rows = std::min(kMaxRows, round_up(std::max<int64_t>(all_rows, 1), kernels.group));
  while (plan.rows > 2 * kernels.group && heads * ((all_rows + plan.rows - 1) / plan.rows) < kEnoughTasks)
    plan.rows -= kernels.group;

  plan.keys_padded = round_up(p.max_seqlen_k, kernels.panel);
  const int64_t headdim_v_padded = round_up(p.headdim_v, kernels.width);
  plan.pack_floats = plan.keys_padded * (p.headdim + headdim_v_padded);
  const int64_t pack_bytes = std::max<int64_t>(plan.pack_floats * 4, 1);
  plan.heads_per_wave = std::clamp<int64_t>(kWaveBytes / pack_bytes, 1, std::max<int64_t>(heads, 1));
  plan.waves = (heads + plan.heads_per_wave - 1) / plan.heads_per_wave;

  plan.workspace_shared = static_cast<int64_t>(
      Arena::padded<float>(plan.heads_per_wave * plan.pack_floats) +
      Arena::padded<uint8_t>(plan.heads_per_wave * (plan.keys_padded / kernels.panel)));
  plan.workspace_per_worker = static_cast<int64_t>(
      Arena::padded<float>(plan.rows * p.headdim) + Arena::padded<float>(plan.rows * headdim_v_padded) +
      Arena::padded<float>(plan.rows * kernels.width) + 3 * Arena::padded<float>(plan.rows) +
      3 * Arena::padded<int64_t>(plan.rows) + 2 * Arena::padded<const char*>(plan.rows) +
      Arena::padded<float>(kernels.attend_scratch));
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

std::string describe(const Plan& plan, const Kernels& k) {
  return std::string("isa ") + k.name + ", score tiles of " + std::to_string(k.group) + " rows x " +
         std::to_string(k.block) + " keys, tasks of " + std::to_string(plan.rows) + " rows, " +
         std::to_string(plan.waves) + (plan.waves == 1 ? " wave of " : " waves of ") +
         std::to_string(plan.heads_per_wave) + " packed heads, workspace " +
         std::to_string(plan.workspace_shared >> 10) + " KiB + " + std::to_string(plan.workspace_per_worker >> 10) +
         " KiB a worker";
}

}  // namespace flash_attn::cpu
