// Forward. Many rows a key head: for each wave of heads, pack keys and values, then attend row range by row range. Few:
// few_rows.cpp. Heads that the kernel of the dtype has to leave (special rows in a kernel of plain ones) are done again
// by the kernel that takes any.
#include <algorithm>
#include <atomic>
#include <vector>

#include "cpu/arena.hpp"
#include "cpu/driver.hpp"
#include "cpu/few_rows.hpp"
#include "cpu/plan.hpp"
#include "cpu/rows.hpp"
#include "cpu/threads.hpp"

namespace flash_attn::cpu {
namespace {

/// Packs the heads of a wave, in chunks of about 2^15 elements, 5 us each: few heads must do for many workers. The
/// heads' offsets in chunks are found by binary search.
void pack_wave(const Forward& f, const std::vector<Head>& heads, const std::vector<Pack>& packs, int workers,
               Left& left) {
  const int64_t panel = f.kernel.panel;
  const int64_t chunk = std::max<int64_t>(1, (int64_t{1} << 15) / (panel * (f.p.headdim + f.p.headdim_v))) * panel;
  std::vector<int64_t> chunks_before(1, 0);
  for (const Head& h : heads) chunks_before.push_back(chunks_before.back() + divide_up(h.sequence.seqlen_k, chunk));
  parallel_for(chunks_before.back(), workers, [&](int64_t i, int) {
    const auto next = std::upper_bound(chunks_before.begin(), chunks_before.end(), i);
    const auto at = static_cast<std::size_t>(next - chunks_before.begin() - 1);
    const int64_t begin = (i - *(next - 1)) * chunk;
    for (int64_t j = begin; j < std::min(begin + chunk, heads[at].sequence.seqlen_k); j += panel)
      if (pack_panel(f, heads[at], packs[at], j)) left[at] = true;
  });
}

std::vector<int64_t> attend_many_rows(const Forward& f, const std::vector<Head>& all, int workers, Arena& arena) {
  const Plan& plan = f.plan;
  const int64_t panels = plan.pack_keys / f.kernel.panel;
  char* const memory = arena.take<char>(plan.heads_per_wave * plan.pack_bytes);
  uint8_t* const special = arena.take<uint8_t>(plan.heads_per_wave * panels);
  struct Worker {
    SoftmaxSums sums;
    Rows rows;
  };
  std::vector<Worker> space;
  for (int w = 0; w < workers; ++w) space.push_back({take_sums(arena, f), Rows(arena, f)});

  struct Task {
    std::size_t head;
    RowRange range;
  };
  std::vector<int64_t> left_indices;
  for (std::size_t first = 0; first < all.size(); first += static_cast<std::size_t>(plan.heads_per_wave)) {
    const std::size_t n = std::min(all.size() - first, static_cast<std::size_t>(plan.heads_per_wave));
    const std::vector<Head> heads(all.begin() + static_cast<std::ptrdiff_t>(first),
                                  all.begin() + static_cast<std::ptrdiff_t>(first + n));
    std::vector<Pack> packs;
    std::vector<Task> tasks;
    for (std::size_t i = 0; i < n; ++i) {
      const auto slot = static_cast<int64_t>(i);
      char* const k = memory + slot * plan.pack_bytes;
      packs.push_back(
          {k, k + plan.k_bytes, special + slot * panels, 0, round_up(heads[i].sequence.seqlen_k, f.kernel.panel)});
      for (const RowRange& r : attend_ranges(plan, f.kernel, f.p.group(), heads[i].sequence.seqlen_q))
        tasks.push_back({i, r});
    }
    Left left(n);
    pack_wave(f, heads, packs, workers, left);
    parallel_for(static_cast<int64_t>(tasks.size()), workers, [&](int64_t i, int worker) {
      const Task& t = tasks[static_cast<std::size_t>(i)];
      auto& [sums, rows] = space[static_cast<std::size_t>(worker)];
      if (left[t.head]) return;
      rows.find(f, heads[t.head], t.range);
      if (rows.start(f, sums)) {
        left[t.head] = true;
        return;
      }
      rows.attend(f, sums, packs[t.head]);
      rows.finish(f, sums);
    });
    const std::vector<int64_t> more = indices_of(left, heads);
    left_indices.insert(left_indices.end(), more.begin(), more.end());
  }
  return left_indices;
}

/// The forward of the heads listed by index; returns those that the kernel leaves.
std::vector<int64_t> attend_heads(const Problem& p, const Kernels& k, const AttendKernel& kernel,
                                  const std::vector<int64_t>& indices) {
  const int threads = max_workers();
  const Forward f{p, k, kernel, make_plan(p, kernel, k.width, threads)};
  const int workers = f.plan.tiny ? 1 : threads;
  Arena arena(static_cast<std::size_t>(f.plan.workspace_shared + workers * f.plan.workspace_per_worker));
  std::vector<Head> heads;
  for (const int64_t index : indices) heads.push_back({index, p.sequences.at(index / p.nheads_k)});
  return f.plan.own_keys ? attend_few_rows(f, heads, workers, arena) : attend_many_rows(f, heads, workers, arena);
}

}  // namespace

void forward(const Problem& p, const Kernels& k) {
  clear_if_uncovered(p);
  std::vector<int64_t> heads;
  for (int64_t b = 0; b < p.batch; ++b) {
    if (p.sequences.at(b).empty()) continue;
    for (int64_t hk = 0; hk < p.nheads_k; ++hk) heads.push_back(b * p.nheads_k + hk);
  }
  const std::vector<int64_t> left = attend_heads(p, k, attend_kernel(k, p), heads);
  if (!left.empty()) attend_heads(p, k, *k.attend_any, left);
}

}  // namespace flash_attn::cpu
