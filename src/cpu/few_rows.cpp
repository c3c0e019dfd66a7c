#include "cpu/few_rows.hpp"

#include <algorithm>

#include "cpu/driver.hpp"
#include "cpu/threads.hpp"

namespace flash_attn::cpu {
namespace {

/// Heads [first, first + count) of the list: of one sequence, at most plan.heads_per_task.
struct Team {
  std::size_t first, count;
};

std::vector<Team> teams_of(const Forward& f, const std::vector<Head>& heads) {
  std::vector<Team> teams;
  const auto most = static_cast<std::size_t>(f.plan.heads_per_task);
  for (std::size_t i = 0; i < heads.size(); ++i) {
    const bool same = i > 0 && heads[i].index / f.p.nheads_k == heads[i - 1].index / f.p.nheads_k;
    if (same && heads[i].index == heads[i - 1].index + 1 && teams.back().count < most)
      ++teams.back().count;
    else
      teams.push_back({i, 1});
  }
  return teams;
}

/// A worker's memory.
class Owner {
 public:
  Owner(Arena& arena, const Forward& f) {
    for (int64_t i = 0; i < f.plan.heads_per_task; ++i) {
      sums.push_back(take_sums(arena, f));
      rows.emplace_back(arena, f);
    }
    if (f.kernel.attend_in_place) {
      k_rows_ = arena.take<const char*>(f.plan.pack_keys), v_rows_ = arena.take<const char*>(f.plan.pack_keys);
      return;
    }
    pack_.k = arena.take<char>(f.plan.pack_bytes), pack_.v = pack_.k + f.plan.k_bytes;
    pack_.v_special = arena.take<uint8_t>(f.plan.pack_keys / f.kernel.panel);
  }

  /// All rows of `count` heads against keys [begin, end), a chunk at a time; returns whether the heads must be left.
  bool attend(const Forward& f, const Head* heads, std::size_t count, int64_t begin, int64_t end,
              const SoftmaxSums* to) {
    for (std::size_t h = 0; h < count; ++h) {
      rows[h].find(f, heads[h], {0, heads[h].sequence.seqlen_q * f.p.group()});
      if (rows[h].start(f, to[h])) return true;
    }
    for (; begin < end; begin += f.plan.pack_keys) {
      const int64_t n = std::min(f.plan.pack_keys, end - begin);
      if (!rows[0].see(begin, begin + n)) continue;
      if (f.kernel.attend_in_place)
        attend_in_place(f, heads, count, begin, n, to);
      else if (!attend_packed(f, *heads, begin, n, *to))
        return true;
    }
    return false;
  }

  std::vector<SoftmaxSums> sums;  // of each head
  std::vector<Rows> rows;

 private:
  bool attend_packed(const Forward& f, const Head& head, int64_t begin, int64_t n, const SoftmaxSums& to) {
    pack_.begin = begin, pack_.keys = round_up(n, f.kernel.panel);
    bool leave = false;
    for (int64_t j = 0; j < n; j += f.kernel.panel) leave |= pack_panel(f, head, pack_, j);
    if (!leave) rows[0].attend(f, to, pack_);
    return !leave;
  }

  void attend_in_place(const Forward& f, const Head* heads, std::size_t count, int64_t begin, int64_t n,
                       const SoftmaxSums* to) {
    const Problem& p = f.p;
    const int64_t hk = heads->index % p.nheads_k, size = static_cast<int64_t>(size_of(p.dtype));
    key_rows(p, p.k, heads->sequence, hk, begin, n, k_rows_);
    key_rows(p, p.v, heads->sequence, hk, begin, n, v_rows_);
    tasks_.clear();
    for (std::size_t h = 0; h < count; ++h) tasks_.push_back(rows[h].task(f, to[h], begin, n));
    f.kernel.attend_in_place(tasks_.data(), static_cast<int64_t>(count),
                             {.k = {k_rows_, n, p.headdim, 1, p.dtype},
                              .v = {v_rows_, n, p.headdim_v, 1, p.dtype},
                              .k_head = p.k.stride_head * size,
                              .v_head = p.v.stride_head * size});
  }

  Pack pack_{};
  const char **k_rows_ = nullptr, **v_rows_ = nullptr;
  std::vector<AttendTask> tasks_;
};

}  // namespace

std::vector<int64_t> attend_few_rows(const Forward& f, const std::vector<Head>& heads, int workers, Arena& arena) {
  const Plan& plan = f.plan;
  const auto splits = static_cast<std::size_t>(plan.splits);
  std::vector<SoftmaxSums> split_sums;  // (splits, heads)
  for (std::size_t i = 0; splits > 1 && i < splits * heads.size(); ++i) split_sums.push_back(take_sums(arena, f));
  std::vector<Owner> owners;
  for (int w = 0; w < workers; ++w) owners.emplace_back(arena, f);

  const auto splits_of = [&](const Head& h) { return divide_up(h.sequence.seqlen_k, plan.keys_per_split); };
  const std::vector<Team> teams = teams_of(f, heads);
  Left left(heads.size());
  parallel_for(static_cast<int64_t>(teams.size()) * plan.splits, workers, [&](int64_t i, int worker) {
    const Team& team = teams[static_cast<std::size_t>(i / plan.splits)];
    const Head& head = heads[team.first];
    const int64_t split = i % plan.splits, begin = split * plan.keys_per_split;
    const int64_t end = std::min(begin + plan.keys_per_split, head.sequence.seqlen_k);
    if (left[team.first] || begin >= end) return;
    Owner& mine = owners[static_cast<std::size_t>(worker)];
    const bool whole = splits_of(head) == 1;
    const SoftmaxSums* const sums =
        whole ? mine.sums.data() : &split_sums[static_cast<std::size_t>(split) * heads.size() + team.first];
    if (mine.attend(f, &head, team.count, begin, end, sums))
      for (std::size_t h = 0; h < team.count; ++h) left[team.first + h] = true;
    else if (whole)
      for (std::size_t h = 0; h < team.count; ++h) mine.rows[h].finish(f, sums[h]);
  });
  // The sums of a head's splits, a few rows a task.
  const int64_t parts = plan.rows / f.kernel.group, count = static_cast<int64_t>(heads.size());
  if (splits > 1)
    parallel_for(count * parts, workers, [&](int64_t i, int worker) {
      const auto at = static_cast<std::size_t>(i / parts);
      const Head& head = heads[at];
      const int64_t row = i % parts * f.kernel.group;
      const int64_t n = std::min(f.kernel.group, head.sequence.seqlen_q * f.p.group() - row);
      if (left[at] || splits_of(head) == 1 || n <= 0) return;
      const auto sums_at = [&](int64_t split) {
        return skip_rows(split_sums[static_cast<std::size_t>(split) * heads.size() + at], f, row);
      };
      const SoftmaxSums sums = sums_at(0);
      for (int64_t split = 1; split < splits_of(head); ++split) f.k.merge_rows(n, f.p.headdim_v, sums_at(split), sums);
      Rows& rows = owners[static_cast<std::size_t>(worker)].rows.front();
      rows.find(f, head, {row, n});
      rows.finish(f, sums);
    });
  return indices_of(left, heads);
}

}  // namespace flash_attn::cpu
