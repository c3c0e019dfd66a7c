// Forward. Many rows a key head: for each wave of heads, pack keys and values, then attend row range by row range. Few:
// each task packs the keys it owns (plan.hpp). Heads that the kernel of the dtype has to leave (special rows in a
// kernel of plain ones) are done again by the kernel that takes any.
#include <algorithm>
#include <atomic>
#include <vector>

#include "cpu/arena.hpp"
#include "cpu/driver.hpp"
#include "cpu/plan.hpp"
#include "cpu/rows.hpp"
#include "cpu/threads.hpp"

namespace flash_attn::cpu {
namespace {

/// Which heads of some must be done again by another kernel: tasks say so while they run.
using Left = std::vector<std::atomic<bool>>;

std::vector<int64_t> indices_of(const Left& left, const std::vector<Head>& heads) {
  std::vector<int64_t> indices;
  for (std::size_t i = 0; i < heads.size(); ++i)
    if (left[i]) indices.push_back(heads[i].index);
  return indices;
}

// ---- many rows -------------------------------------------------------------------------------------------------

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
      for (const RowRange& r : attend_ranges(plan, f.p.group(), heads[i].sequence.seqlen_q)) tasks.push_back({i, r});
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

// ---- few rows --------------------------------------------------------------------------------------------------

/// A worker's memory where tasks own their keys.
struct Owner {
  Pack pack;
  SoftmaxSums sums;
  Rows rows;

  Owner(Arena& arena, const Forward& f)
      : pack{arena.take<char>(f.plan.pack_bytes), nullptr, arena.take<uint8_t>(f.plan.pack_keys / f.kernel.panel), 0,
             0},
        sums(take_sums(arena, f)),
        rows(arena, f) {
    pack.v = pack.k + f.plan.k_bytes;
  }

  /// All rows of a head against keys [begin, end), packed by chunks; returns whether the head must be left.
  bool attend(const Forward& f, const Head& head, int64_t begin, int64_t end, const SoftmaxSums& to) {
    if (rows.start(f, to)) return true;
    for (; begin < end; begin += f.plan.pack_keys) {
      const int64_t n = std::min(f.plan.pack_keys, end - begin);
      if (!rows.see(begin, begin + n)) continue;
      pack.begin = begin, pack.keys = round_up(n, f.kernel.panel);
      bool leave = false;
      for (int64_t j = 0; j < n; j += f.kernel.panel) leave |= pack_panel(f, head, pack, j);
      if (leave) return true;
      rows.attend(f, to, pack);
    }
    return false;
  }
};

std::vector<int64_t> attend_few_rows(const Forward& f, const std::vector<Head>& heads, int workers, Arena& arena) {
  const Plan& plan = f.plan;
  const auto count = static_cast<int64_t>(heads.size());
  std::vector<SoftmaxSums> split_sums;  // (heads, splits)
  for (int64_t i = 0; plan.splits > 1 && i < count * plan.splits; ++i) split_sums.push_back(take_sums(arena, f));
  std::vector<Owner> owners;
  for (int w = 0; w < workers; ++w) owners.emplace_back(arena, f);

  const auto rows_of = [&](const Head& h) { return h.sequence.seqlen_q * f.p.group(); };
  const auto splits_of = [&](const Head& h) { return divide_up(h.sequence.seqlen_k, plan.keys_per_split); };
  Left left(heads.size());
  parallel_for(count * plan.splits, workers, [&](int64_t i, int worker) {
    const auto at = static_cast<std::size_t>(i / plan.splits);
    const Head& head = heads[at];
    const int64_t split = i % plan.splits, begin = split * plan.keys_per_split;
    const int64_t end = std::min(begin + plan.keys_per_split, head.sequence.seqlen_k);
    if (left[at] || begin >= end) return;
    Owner& mine = owners[static_cast<std::size_t>(worker)];
    const RowRange all{0, rows_of(head)};
    const bool whole = splits_of(head) == 1;
    const SoftmaxSums& sums = whole ? mine.sums : split_sums[static_cast<std::size_t>(i)];
    mine.rows.find(f, head, all);
    if (mine.attend(f, head, begin, end, sums))
      left[at] = true;
    else if (whole)
      mine.rows.finish(f, sums);
  });
  // The sums of a head's splits, a few rows a task.
  const int64_t parts = plan.rows / f.kernel.group;
  if (plan.splits > 1)
    parallel_for(count * parts, workers, [&](int64_t i, int worker) {
      const auto at = static_cast<std::size_t>(i / parts);
      const Head& head = heads[at];
      const int64_t row = i % parts * f.kernel.group, n = std::min(f.kernel.group, rows_of(head) - row);
      if (left[at] || splits_of(head) == 1 || n <= 0) return;
      const auto sums_at = [&](int64_t split) {
        return skip_rows(split_sums[at * static_cast<std::size_t>(plan.splits) + static_cast<std::size_t>(split)], f,
                         row);
      };
      const SoftmaxSums sums = sums_at(0);
      for (int64_t split = 1; split < splits_of(head); ++split) f.k.merge_rows(n, f.p.headdim_v, sums_at(split), sums);
      Rows& rows = owners[static_cast<std::size_t>(worker)].rows;
      rows.find(f, head, {row, n});
      rows.finish(f, sums);
    });
  return indices_of(left, heads);
}

/// The forward of the heads listed by index; returns those that the kernel leaves.
std::vector<int64_t> attend_heads(const Problem& p, const Kernels& k, const AttendKernel& kernel,
                                  const std::vector<int64_t>& indices) {
  const Forward f{p, k, kernel, make_plan(p, kernel, k.width)};
  const int workers = max_workers();
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
  const std::vector<int64_t> left = attend_heads(p, k, attend_kernel(k, p.dtype), heads);
  if (!left.empty()) attend_heads(p, k, *k.attend_any, left);
}

}  // namespace flash_attn::cpu
