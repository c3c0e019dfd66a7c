// Some queries of one head in the backward, while the keys that they see pass by, one split after the other.
#pragma once

#include "cpu/plan.hpp"
#include "cpu/row_terms.hpp"

namespace flash_attn::cpu {

/// What all tasks of a backward share.
struct BackwardPass {
  const Problem& p;
  const Kernels& k;
  const BackwardKernel& kernel;  // of the dtype; special rows take k.backward_any
  const BackwardPlan plan;
};

/// A worker's memory for up to plan.rows queries.
class GradientRows {
 public:
  GradientRows(Arena& arena, const BackwardPlan& plan);

  /// Looks up queries [first, last) of a head of sequence b, at most plan.rows: the terms of their scores, and lse.
  void look_up(const BackwardPass& pass, const Sequence& sequence, int64_t b, int64_t head, int64_t first,
               int64_t last);
  bool may_see(int64_t begin, int64_t end) const { return terms_.may_see(begin, end); }
  /// Computes delta, which task_of_keys() and sink_gradient() need.
  void compute_delta(const BackwardPass& pass);
  /// Packs q and dout for a kernel, unless they are packed for it; returns whether some row is special.
  bool pack_for(const BackwardPass& pass, const BackwardKernel& kernel);
  /// The task of the kernel that the queries are packed for and of keys from `begin` on, but for those keys. dq is 0.
  BackwardTask task_of_keys(const BackwardPass& pass, int64_t begin);
  /// Writes the gradients of the bias that kernels do not: those of keys of [begin, end) that a row does not see.
  void clear_unseen_dbias(const BackwardPass& pass, int64_t begin, int64_t end);
  /// dq of no keys, (rows, headdim padded to the width).
  const float* clear_dq(const BackwardPass& pass);
  /// d loss / d sink of these queries.
  double sink_gradient(const BackwardPass& pass) const;

 private:
  void count_from(const BackwardPass& pass, int64_t key);
  /// `largest_` of rows that a finite bias hides whole: -1e30, or the least of a dtype. Then lse is that number, and
  /// how many keys share it was lost when lse was rounded.
  void share_hidden_rows(const BackwardPass& pass);
  /// How many scores of a row kernels count as its largest.
  int64_t largest_scores(const BackwardPass& pass, int64_t r) const;
  int64_t rows() const { return last_ - first_; }

  Sequence sequence_{};
  int64_t b_ = 0, head_ = 0, first_ = 0, last_ = 0;
  const BackwardKernel* packed_for_ = nullptr;
  bool special_ = false;
  int64_t dbias_origin_ = 0;

  RowTerms terms_;
  char *queries_, *scratch_;
  uint8_t* row_special_;
  float *dq_, *base_, *delta_, *largest_;  // as in BackwardTask
  float** dbias_;                          // of key dbias_origin_
};

}  // namespace flash_attn::cpu
