#include "cpu/many_rows.hpp"

#include <algorithm>

#include "cpu/rounding.hpp"
#include "cpu/threads.hpp"

namespace flash_attn::cpu {

ManyRows::Worker::Worker(Arena& arena, const Plan& plan, const AttendKernel& kernel)
    : sums(take_sums(arena, plan)), rows(arena, plan, kernel) {}

std::vector<Pack> ManyRows::take_packs(Arena& arena, const Plan& plan, const AttendKernel& kernel) {
  std::vector<Pack> packs;
  for (int64_t i = 0; i < plan.heads_per_wave; ++i) packs.push_back(Pack::take(arena, plan, kernel));
  return packs;
}

ManyRows::ManyRows(const ForwardPass& pass, std::vector<Head> heads, Arena& arena)
    : pass_(pass), heads_(std::move(heads)), packs_(take_packs(arena, pass.plan, pass.kernel)) {
  for (int w = 0; w < pass.plan.workers; ++w) workers_.emplace_back(arena, pass.plan, pass.kernel);
}

/// The wave's keys, packed_at_once() a task. Which head a task belongs to is found by binary search.
void ManyRows::pack(const std::vector<Head>& wave, RedoMarks& redo) {
  const int64_t panel = pass_.kernel.panel, at_once = packed_at_once(pass_.kernel, pass_.p);
  std::vector<int64_t> tasks_before(1, 0);
  for (std::size_t i = 0; i < wave.size(); ++i) {
    packs_[i].begin = 0, packs_[i].keys = round_up(wave[i].sequence.seqlen_k, panel);
    tasks_before.push_back(tasks_before.back() + divide_up(wave[i].sequence.seqlen_k, at_once));
  }
  parallel_for(tasks_before.back(), pass_.plan.workers, [&](int64_t i, int) {
    const auto next = std::upper_bound(tasks_before.begin(), tasks_before.end(), i);
    const auto at = static_cast<std::size_t>(next - tasks_before.begin() - 1);
    const int64_t begin = (i - *(next - 1)) * at_once;
    for (int64_t j = begin; j < std::min(begin + at_once, wave[at].sequence.seqlen_k); j += panel)
      if (pack_panel(pass_, wave[at], packs_[at], j)) redo[at] = true;
  });
}

void ManyRows::attend_wave(const std::vector<Head>& wave, RedoMarks& redo) {
  struct Task {
    std::size_t head;
    RowRange range;
  };
  std::vector<Task> tasks;
  for (std::size_t i = 0; i < wave.size(); ++i)
    for (const RowRange& r : attend_ranges(pass_.plan, pass_.kernel, pass_.p.group(), wave[i].sequence.seqlen_q))
      tasks.push_back({i, r});
  parallel_for(static_cast<int64_t>(tasks.size()), pass_.plan.workers, [&](int64_t i, int w) {
    const auto& [head, range] = tasks[static_cast<std::size_t>(i)];
    auto& [sums, rows] = workers_[static_cast<std::size_t>(w)];
    if (redo[head]) return;
    rows.look_up(pass_, wave[head], range);
    if (rows.begin_sums(pass_, sums)) {
      redo[head] = true;
      return;
    }
    rows.attend(pass_, sums, packs_[head]);
    rows.write_results(pass_, sums);
  });
}

std::vector<int64_t> ManyRows::attend() {
  std::vector<int64_t> to_redo;
  const auto most = static_cast<std::size_t>(pass_.plan.heads_per_wave);
  for (std::size_t first = 0; first < heads_.size(); first += most) {
    const std::size_t n = std::min(heads_.size() - first, most);
    const auto begin = heads_.begin() + static_cast<std::ptrdiff_t>(first);
    const std::vector<Head> wave(begin, begin + static_cast<std::ptrdiff_t>(n));
    RedoMarks redo(n);
    pack(wave, redo);
    attend_wave(wave, redo);
    const std::vector<int64_t> marked = marked_indices(redo, wave);
    to_redo.insert(to_redo.end(), marked.begin(), marked.end());
  }
  return to_redo;
}

}  // namespace flash_attn::cpu
