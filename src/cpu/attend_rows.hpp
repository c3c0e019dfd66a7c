// The forward of the rows of one task: looked up, attended, written; and the packs of keys that they attend to.
#pragma once

#include <atomic>
#include <vector>

#include "cpu/plan.hpp"
#include "cpu/row_terms.hpp"

namespace flash_attn::cpu {

/// What all tasks of a forward share.
struct ForwardPass {
  const Problem& p;
  const Kernels& k;
  const AttendKernel& kernel;
  const Plan plan;
};

/// One key head of one sequence.
struct Head {
  int64_t index;  // batch entry * nheads_k + key head
  Sequence sequence;
};

/// Which heads of a list another kernel must do again, because a plain one met special values (AttendKernel). Tasks
/// mark them while they run.
using RedoMarks = std::vector<std::atomic<bool>>;
std::vector<int64_t> marked_indices(const RedoMarks& marks, const std::vector<Head>& heads);

/// Packed keys [begin, begin + keys) of a head.
struct Pack {
  char *k, *v;
  uint8_t* v_special;   // (keys / panel)
  int64_t begin, keys;  // keys: padded to panels

  /// Memory for plan.pack_keys keys.
  static Pack take(Arena& arena, const Plan& plan, const AttendKernel& kernel);
};

/// Packs the panel that begins at key `first` of the pack; returns whether the kernel cannot treat it.
bool pack_panel(const ForwardPass& pass, const Head& head, const Pack& to, int64_t first);

/// The softmax sums of plan.rows rows, as AttendTask has them.
SoftmaxSums take_sums(Arena& arena, const Plan& plan);
/// Those of the rows from `row` on.
SoftmaxSums skip_rows(const SoftmaxSums& sums, const Plan& plan, int64_t row);

/// A worker's memory for the rows of one task.
class AttendRows {
 public:
  AttendRows(Arena& arena, const Plan& plan, const AttendKernel& kernel);

  /// Looks up the rows of a range: their addresses, and the terms of their scores.
  void look_up(const ForwardPass& pass, const Head& head, const RowRange& range);
  bool may_see(int64_t begin, int64_t end) const { return terms_.may_see(begin, end); }
  /// Clears the sums and packs q; returns whether the kernel cannot treat the rows.
  bool begin_sums(const ForwardPass& pass, const SoftmaxSums& sums);
  /// Adds what the rows see of a pack. `ahead`: memory that the kernel asks for meanwhile.
  void attend(const ForwardPass& pass, const SoftmaxSums& sums, const Pack& keys, const std::vector<Ahead>& ahead = {});
  /// The task of keys [begin, begin + keys), but for where they are.
  AttendTask task_of_keys(const ForwardPass& pass, const SoftmaxSums& sums, int64_t begin, int64_t keys);
  /// Writes out and lse.
  void write_results(const ForwardPass& pass, const SoftmaxSums& sums);

 private:
  /// body(r, h, i): row r is query i of head h.
  template <class Body>
  void for_each_row(const ForwardPass& pass, const Body& body) const;

  Head head_{};
  RowRange range_{};
  RowTerms terms_;
  char *q_, *scratch_;
  float *factor_, *lse_;
  const char **q_rows_, **out_rows_;
};

}  // namespace flash_attn::cpu
