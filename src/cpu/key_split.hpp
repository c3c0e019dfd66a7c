// A run of keys of one head in the backward, packed, with the sums of their dk and dv. The queries that see the keys
// pass by, 192 at a time say, and each adds to the sums.
#pragma once

#include <algorithm>
#include <vector>

#include "cpu/gradient_rows.hpp"

namespace flash_attn::cpu {

/// A worker's memory for one split.
class KeySplit {
 public:
  /// `rows`: where sums become rows, if the kernel sums in a layout of its own; all splits of a worker share it.
  KeySplit(Arena& arena, const BackwardPlan& plan, float* rows);
  static float* take_rows(Arena& arena, const BackwardPlan& plan) {
    return arena.take<float>(plan.transposes ? plan.keys_per_split * std::max(plan.ldq, plan.ldo) : 0);
  }

  /// Packs keys [begin, end) of key head hk of a sequence and clears their sums.
  void begin_keys(const BackwardPass& pass, const Sequence& sequence, int64_t hk, int64_t begin, int64_t end);
  /// Adds what the queries do to dk, dv and dbias; returns the queries' dq, (rows, headdim padded to the width).
  /// `ahead`: memory that the kernel asks for meanwhile.
  const float* add_queries(const BackwardPass& pass, GradientRows& queries, const std::vector<Ahead>& ahead);
  /// Writes dk and dv.
  void write_gradients(const BackwardPass& pass);

  int64_t begin() const { return begin_; }
  int64_t end() const { return end_; }

 private:
  void pack_for(const BackwardPass& pass, const BackwardKernel& kernel);
  bool pack(const BackwardPass& pass);

  Sequence sequence_{};
  int64_t hk_ = 0, begin_ = 0, end_ = 0;
  const BackwardKernel* packed_for_ = nullptr;
  char* keys_;
  uint8_t* special_;
  float *dk_, *dv_, *rows_;
};

}  // namespace flash_attn::cpu
