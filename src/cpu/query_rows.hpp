// Some queries of one head in the backward, while the keys that they see pass by, a split at a time.
#pragma once

#include "core/problem.hpp"
#include "cpu/arena.hpp"
#include "cpu/kernels.hpp"
#include "cpu/plan.hpp"

namespace flash_attn::cpu {

/// What all tasks of a backward share.
struct Backward {
  const Problem& p;
  const Kernels& k;
  const BackwardKernel& kernel;  // of the dtype; special rows take k.backward_any
  const BackwardPlan plan;
};

/// A worker's memory for them.
class QueryRows {
 public:
  QueryRows(Arena& arena, const Backward& f);

  /// Looks up queries [first, last) of a head of sequence b, at most plan.rows: what they see, and the terms of their
  /// scores.
  void find(const Backward& f, const Sequence& sequence, int64_t b, int64_t head, int64_t first, int64_t last);
  /// Whether some query sees a key of [begin, end).
  bool see(int64_t begin, int64_t end) const;
  /// Computes delta, which task() and sink_gradient() need.
  void start(const Backward& f);
  /// Packs q and dout for a kernel, if they are not; returns whether some row is special.
  bool pack(const Backward& f, const BackwardKernel& kernel);
  /// The task of the kernel that they are packed for and of keys from `begin` on, but for those keys. dq is 0.
  BackwardTask task(const Backward& f, int64_t begin);
  /// Writes the gradients of the bias that kernels do not: those of keys of [begin, end) that a row does not see.
  void clear_unseen_dbias(const Backward& f, int64_t begin, int64_t end);
  /// dq of no keys, (rows, headdim padded to the width).
  const float* zeros(const Backward& f);
  /// d loss / d sink of them.
  double sink_gradient(const Backward& f) const;

 private:
  void count_from(const Backward& f, int64_t key);

  Sequence sequence_{};
  int64_t head_ = 0, first_ = 0, last_ = 0;
  Interval seen_{};                         // by some query: keys of the sequence
  const BackwardKernel* kernel_ = nullptr;  // that they are packed for
  bool special_ = false;
  int64_t origin_ = 0;

  char *queries_, *scratch_;
  uint8_t* row_special_;
  float *dq_, *base_, *delta_, *slope_;
  int64_t *lo_, *hi_, *position_;  // counted from key origin_
  const char** bias_;              // of key origin_
  float** dbias_;                  // of key origin_
  DropoutRow* dropped_;
};

/// Writes n rows of `dtype`, row i at find(i), from src (n, ld), times factor.
template <class FindRow>
void store_rows(const Kernels& k, int64_t n, int64_t cols, int64_t stride_col, DType dtype, float factor,
                const float* src, int64_t ld, const FindRow& find) {
  constexpr int64_t kRun = 64;
  const char* rows[kRun];
  float factors[kRun];
  for (float& x : factors) x = factor;
  for (int64_t r = 0; r < n; r += kRun) {
    const int64_t m = n - r < kRun ? n - r : kRun;
    for (int64_t i = 0; i < m; ++i) rows[i] = find(r + i);
    k.store_rows({rows, m, cols, stride_col, dtype}, factors, src + r * ld, ld);
  }
}

}  // namespace flash_attn::cpu
