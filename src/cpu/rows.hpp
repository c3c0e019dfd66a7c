// The rows of a forward task: found, attended, finished; and the packs of keys that they attend to.
#pragma once

#include <atomic>
#include <vector>

#include "core/problem.hpp"
#include "cpu/arena.hpp"
#include "cpu/kernels.hpp"
#include "cpu/plan.hpp"

namespace flash_attn::cpu {

/// What all tasks of a forward share.
struct Forward {
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

/// Which heads of some must be done again by another kernel: tasks say so while they run.
using Left = std::vector<std::atomic<bool>>;
std::vector<int64_t> indices_of(const Left& left, const std::vector<Head>& heads);

/// Packed keys [begin, begin + keys) of a head.
struct Pack {
  char *k, *v;
  uint8_t* v_special;   // (keys / panel)
  int64_t begin, keys;  // keys: padded to panels
};

/// Packs the panel that begins at key `first` of the pack; returns whether the kernel must leave the head.
bool pack_panel(const Forward& f, const Head& head, const Pack& to, int64_t first);

/// The softmax sums of plan.rows rows, as AttendTask has them.
SoftmaxSums take_sums(Arena& arena, const Forward& f);
/// Those of the rows from `row` on.
SoftmaxSums skip_rows(const SoftmaxSums& sums, const Forward& f, int64_t row);

/// A worker's memory for the rows of one task.
class Rows {
 public:
  Rows(Arena& arena, const Forward& f);

  /// Looks up the rows of a range: their addresses, and what they see.
  void find(const Forward& f, const Head& head, const RowRange& range);
  /// Whether some row sees a key of [begin, end).
  bool see(int64_t begin, int64_t end) const;
  /// Clears the sums and packs q; returns whether the kernel must leave the head.
  bool start(const Forward& f, const SoftmaxSums& sums);
  /// Adds what the rows see of a pack.
  void attend(const Forward& f, const SoftmaxSums& sums, const Pack& keys);
  /// The task of keys [begin, begin + keys), but for where they are.
  AttendTask task(const Forward& f, const SoftmaxSums& sums, int64_t begin, int64_t keys);
  /// Writes out and lse.
  void finish(const Forward& f, const SoftmaxSums& sums);

 private:
  /// body(r, h, i): row r is query i of head h.
  template <class Body>
  void each(const Forward& f, const Body& body) const;

  Head head_{};
  RowRange range_{};
  char *q_, *tiles_;
  float *slope_, *factor_, *lse_;
  int64_t *lo_, *hi_, *position_;              // counted from key origin_
  const char **q_rows_, **out_rows_, **bias_;  // bias_: of key origin_
  DropoutRow* dropped_;
  int64_t origin_ = 0;
};

}  // namespace flash_attn::cpu
