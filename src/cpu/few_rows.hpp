// The forward where all rows of a key head fit one task: a task owns its keys (plan.hpp).
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/arena.hpp"
#include "cpu/attend_rows.hpp"

namespace flash_attn::cpu {

/// Some heads of a forward. All memory is taken by the constructor.
class FewRows {
 public:
  /// A worker's memory.
  class Worker {
   public:
    Worker(Arena& arena, const Plan& plan, const AttendKernel& kernel);

    /// All rows of `count` heads against keys [begin, end), a chunk at a time; returns whether the kernel cannot treat
    /// them. `ahead`: memory that the kernel asks for meanwhile.
    bool attend(const ForwardPass& pass, const Head* heads, std::size_t count, int64_t begin, int64_t end,
                const SoftmaxSums* to, const std::vector<Ahead>& ahead);

    std::vector<SoftmaxSums> sums;  // of each head of a team
    std::vector<AttendRows> rows;   // of each
    std::vector<Ahead> ahead;

   private:
    bool attend_packed(const ForwardPass& pass, const Head& head, int64_t begin, int64_t n, const SoftmaxSums& to,
                       const std::vector<Ahead>& ahead);
    void attend_in_place(const ForwardPass& pass, const Head* heads, std::size_t count, int64_t begin, int64_t n,
                         const SoftmaxSums* to);

    Pack pack_{};
    const char **k_rows_ = nullptr, **v_rows_ = nullptr;
    std::vector<AttendTask> tasks_;
  };
  /// Sums of the splits of `heads` heads, (splits, heads); none if there is one split.
  static std::vector<SoftmaxSums> take_split_sums(Arena& arena, const Plan& plan, int64_t heads);

  /// Heads of a sequence are neighbours in the list.
  FewRows(const ForwardPass& pass, std::vector<Head> heads, Arena& arena);
  /// Returns the indices of the heads that the kernel cannot treat.
  std::vector<int64_t> attend();

 private:
  /// Heads [first, first + count) of the list: of one sequence, at most plan.heads_per_task.
  struct Team {
    std::size_t first, count;
  };
  void make_teams();
  void attend_team(std::size_t team, int64_t split, Worker& worker);
  void merge_splits(std::size_t head, int64_t row, Worker& worker);
  int64_t splits_of(const Head& head) const;

  const ForwardPass& pass_;
  std::vector<Head> heads_;
  std::vector<Team> teams_;
  std::vector<SoftmaxSums> split_sums_;  // (splits, heads)
  std::vector<Worker> workers_;
  RedoMarks redo_;
};

}  // namespace flash_attn::cpu
