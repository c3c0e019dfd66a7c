// What the score pipeline says of some rows: which keys each sees, and what is added to its scores. Both passes use it.
//
// A task attends to the keys of a pack, and kernels count keys from the first of them. Row 100 of a causal sequence
// sees keys [0, 101); in the task whose pack begins at key 64 that is [-64, 37).
#pragma once

#include "core/problem.hpp"
#include "cpu/arena.hpp"
#include "cpu/kernels.hpp"

namespace flash_attn::cpu {

/// A worker's memory for the terms of up to `capacity` rows.
class RowTerms {
 public:
  RowTerms(Arena& arena, int64_t capacity);

  /// The next rows are those of sequence b. Forgets the rows before.
  void begin_sequence(const Sequence& sequence, int64_t b);
  /// Row `size()` is query i of head `head`; `hidden`: it sees nothing, whatever the mask says.
  void add_query(const Problem& p, int64_t head, int64_t i, bool hidden = false);
  int64_t size() const { return size_; }

  /// Whether a key of [begin, end) of the sequence lies between the first and the last that some row sees.
  bool may_see(int64_t begin, int64_t end) const { return seen_.lo < end && begin < seen_.hi; }
  /// The keys that row r sees, counted from the key that keys are counted from.
  Interval seen_by(int64_t r) const { return {lo_[r], hi_[r]}; }

  /// Counts keys from key `key` of the sequence.
  void count_from(const Problem& p, int64_t key);
  /// Fills in the fields of a task that rows, masks, ALiBi, bias and dropout decide, and how products become scores.
  template <class Task>
  void describe(const Problem& p, Task& task) const;

 private:
  int64_t size_ = 0, origin_ = 0;
  int64_t batch_entry_ = 0;
  Sequence sequence_{};
  Interval seen_{};                // by some row: keys of the sequence
  int64_t *lo_, *hi_, *position_;  // counted from key origin_
  float* slope_;
  const char** bias_;  // of key origin_
  DropoutRow* dropped_;
};

}  // namespace flash_attn::cpu
