// A run of keys of one head in the backward: packed, with the sums of their dk and dv, while the queries that see them
// pass by, some at a time.
#pragma once

#include "cpu/query_rows.hpp"

namespace flash_attn::cpu {

/// A worker's memory for it.
class KeySplit {
 public:
  /// `rows`: where sums become rows, if the kernel has such; one does for all splits of a worker.
  KeySplit(Arena& arena, const Backward& f, float* rows);
  /// Floats of `rows`.
  static int64_t row_floats(const Backward& f);

  /// Takes up keys [begin, end) of key head hk of a sequence; their sums are 0.
  void take(const Backward& f, const Sequence& sequence, int64_t hk, int64_t begin, int64_t end);
  /// Adds what the queries do to dk, dv and dbias; returns their dq, (rows, headdim padded to the width).
  const float* attend(const Backward& f, QueryRows& queries);
  /// Writes dk and dv.
  void store(const Backward& f);

  int64_t begin() const { return begin_; }
  int64_t end() const { return end_; }

 private:
  void use(const Backward& f, const BackwardKernel& kernel);
  bool pack(const Backward& f);

  Sequence sequence_{};
  int64_t hk_ = 0, begin_ = 0, end_ = 0;
  const BackwardKernel* kernel_ = nullptr;  // that has packed them
  char* keys_;
  uint8_t* special_;
  float *dk_, *dv_, *rows_;
};

}  // namespace flash_attn::cpu
