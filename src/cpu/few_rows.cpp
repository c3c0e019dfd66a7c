#include "cpu/few_rows.hpp"

#include <algorithm>

#include "cpu/memory.hpp"
#include "cpu/rounding.hpp"
#include "cpu/threads.hpp"

namespace flash_attn::cpu {

FewRows::Worker::Worker(Arena& arena, const Plan& plan, const AttendKernel& kernel) {
  for (int64_t i = 0; i < plan.heads_per_task; ++i) {
    sums.push_back(take_sums(arena, plan));
    rows.emplace_back(arena, plan, kernel);
  }
  tasks_.reserve(static_cast<std::size_t>(plan.heads_per_task));
  if (kernel.attend_in_place)
    k_rows_ = arena.take<const char*>(plan.pack_keys), v_rows_ = arena.take<const char*>(plan.pack_keys);
  else
    pack_ = Pack::take(arena, plan, kernel);
}

bool FewRows::Worker::attend(const ForwardPass& pass, const Head* heads, std::size_t count, int64_t begin, int64_t end,
                             const SoftmaxSums* to, const std::vector<Ahead>& memory_ahead) {
  for (std::size_t h = 0; h < count; ++h) {
    rows[h].look_up(pass, heads[h], {0, heads[h].sequence.seqlen_q * pass.p.group()});
    if (rows[h].begin_sums(pass, to[h])) return true;
  }
  for (; begin < end; begin += pass.plan.pack_keys) {
    const int64_t n = std::min(pass.plan.pack_keys, end - begin);
    if (!rows[0].may_see(begin, begin + n)) continue;
    if (pass.kernel.attend_in_place)
      attend_in_place(pass, heads, count, begin, n, to);
    else if (!attend_packed(pass, *heads, begin, n, *to, memory_ahead))
      return true;
  }
  return false;
}

bool FewRows::Worker::attend_packed(const ForwardPass& pass, const Head& head, int64_t begin, int64_t n,
                                    const SoftmaxSums& to, const std::vector<Ahead>& memory_ahead) {
  pack_.begin = begin, pack_.keys = round_up(n, pass.kernel.panel);
  bool special = false;
  for (int64_t j = 0; j < n; j += pass.kernel.panel) special |= pack_panel(pass, head, pack_, j);
  if (!special) rows[0].attend(pass, to, pack_, memory_ahead);
  return !special;
}

void FewRows::Worker::attend_in_place(const ForwardPass& pass, const Head* heads, std::size_t count, int64_t begin,
                                      int64_t n, const SoftmaxSums* to) {
  const Problem& p = pass.p;
  const int64_t hk = heads->index % p.nheads_k, size = static_cast<int64_t>(size_of(p.dtype));
  key_rows(p, p.k, heads->sequence, hk, begin, n, k_rows_);
  key_rows(p, p.v, heads->sequence, hk, begin, n, v_rows_);
  tasks_.clear();
  for (std::size_t h = 0; h < count; ++h) tasks_.push_back(rows[h].task_of_keys(pass, to[h], begin, n));
  pass.kernel.attend_in_place(tasks_.data(), static_cast<int64_t>(count),
                              {.k = {k_rows_, n, p.headdim, 1, p.dtype},
                               .v = {v_rows_, n, p.headdim_v, 1, p.dtype},
                               .k_head = p.k.stride_head * size,
                               .v_head = p.v.stride_head * size});
}

std::vector<SoftmaxSums> FewRows::take_split_sums(Arena& arena, const Plan& plan, int64_t heads) {
  std::vector<SoftmaxSums> sums;
  for (int64_t i = 0; plan.splits > 1 && i < plan.splits * heads; ++i) sums.push_back(take_sums(arena, plan));
  return sums;
}

FewRows::FewRows(const ForwardPass& pass, std::vector<Head> heads, Arena& arena)
    : pass_(pass), heads_(std::move(heads)), redo_(heads_.size()) {
  make_teams();
  split_sums_ = take_split_sums(arena, pass.plan, static_cast<int64_t>(heads_.size()));
  for (int w = 0; w < pass.plan.workers; ++w) workers_.emplace_back(arena, pass.plan, pass.kernel);
}

void FewRows::make_teams() {
  const auto most = static_cast<std::size_t>(pass_.plan.heads_per_task);
  const int64_t nheads_k = pass_.p.nheads_k;
  for (std::size_t i = 0; i < heads_.size(); ++i) {
    const bool same = i > 0 && heads_[i].index / nheads_k == heads_[i - 1].index / nheads_k;
    if (same && heads_[i].index == heads_[i - 1].index + 1 && teams_.back().count < most)
      ++teams_.back().count;
    else
      teams_.push_back({i, 1});
  }
}

int64_t FewRows::splits_of(const Head& head) const {
  return divide_up(head.sequence.seqlen_k, pass_.plan.keys_per_split);
}

/// What a worker reads and writes after it has attended to head `at`: the head's results, and then most likely the next
/// head.
static void ask_after_head(const ForwardPass& pass, const std::vector<Head>& heads, std::size_t at,
                           std::vector<Ahead>& ahead) {
  const Problem& p = pass.p;
  const auto of_group = [&](const Operand& x, const Head& head, int64_t cols) {
    for (int64_t g = 0; g < p.group(); ++g)
      ask_queries(x, head.sequence, head.index % p.nheads_k * p.group() + g, head.sequence.seqlen_q, cols, ahead);
  };
  ahead.clear();
  of_group(p.out, heads[at], p.headdim_v);
  if (at + 1 == heads.size()) return;
  const Head& next = heads[at + 1];
  const int64_t hk = next.index % p.nheads_k;
  of_group(p.q, next, p.headdim);
  ask_keys(p, p.k, next.sequence, hk, next.sequence.seqlen_k, p.headdim, ahead);
  ask_keys(p, p.v, next.sequence, hk, next.sequence.seqlen_k, p.headdim_v, ahead);
}

void FewRows::attend_team(std::size_t index, int64_t split, Worker& worker) {
  const Plan& plan = pass_.plan;
  const Team& team = teams_[index];
  const Head& head = heads_[team.first];
  const int64_t begin = split * plan.keys_per_split;
  const int64_t end = std::min(begin + plan.keys_per_split, head.sequence.seqlen_k);
  if (redo_[team.first] || begin >= end) return;
  const bool whole = splits_of(head) == 1;
  const SoftmaxSums* const sums =
      whole ? worker.sums.data() : &split_sums_[static_cast<std::size_t>(split) * heads_.size() + team.first];
  if (plan.asks_ahead) ask_after_head(pass_, heads_, team.first, worker.ahead);
  if (worker.attend(pass_, &head, team.count, begin, end, sums, worker.ahead))
    for (std::size_t h = 0; h < team.count; ++h) redo_[team.first + h] = true;
  else if (whole)
    for (std::size_t h = 0; h < team.count; ++h) worker.rows[h].write_results(pass_, sums[h]);
}

/// A tile of rows of a head: the sums of its splits, and the results.
void FewRows::merge_splits(std::size_t at, int64_t row, Worker& worker) {
  const Head& head = heads_[at];
  const int64_t n = std::min(pass_.kernel.tile_rows, head.sequence.seqlen_q * pass_.p.group() - row);
  if (redo_[at] || splits_of(head) == 1 || n <= 0) return;
  const auto sums_at = [&](int64_t split) {
    return skip_rows(split_sums_[static_cast<std::size_t>(split) * heads_.size() + at], pass_.plan, row);
  };
  const SoftmaxSums sums = sums_at(0);
  for (int64_t split = 1; split < splits_of(head); ++split)
    pass_.k.merge_rows(n, pass_.p.headdim_v, sums_at(split), sums);
  AttendRows& rows = worker.rows.front();
  rows.look_up(pass_, head, {row, n});
  rows.write_results(pass_, sums);
}

std::vector<int64_t> FewRows::attend() {
  const Plan& plan = pass_.plan;
  const auto worker = [&](int w) -> Worker& { return workers_[static_cast<std::size_t>(w)]; };
  // Neighbouring heads share pages of the results. Where several workers write fresh pages at once, each faults all of
  // them in.
  const Order order = plan.splits == 1 && !pass_.kernel.attend_in_place ? Order::by_place : Order::rising;
  parallel_for(
      static_cast<int64_t>(teams_.size()) * plan.splits, plan.workers,
      [&](int64_t i, int w) { attend_team(static_cast<std::size_t>(i / plan.splits), i % plan.splits, worker(w)); },
      order);
  const int64_t parts = plan.rows / pass_.kernel.tile_rows;
  if (plan.splits > 1)
    parallel_for(static_cast<int64_t>(heads_.size()) * parts, plan.workers, [&](int64_t i, int w) {
      merge_splits(static_cast<std::size_t>(i / parts), i % parts * pass_.kernel.tile_rows, worker(w));
    });
  return marked_indices(redo_, heads_);
}

}  // namespace flash_attn::cpu
