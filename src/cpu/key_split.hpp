// A run of keys of one head in the backward: packed, with the sums of their dk and dv, while the queries that see them
// pass by, some at a time.
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

/// A worker's memory for it.
class KeySplit {
 public:
  KeySplit(Arena& arena, const Backward& f);

  /// Takes up keys [begin, end) of key head hk of sequence b; their sums are 0.
  void take_keys(const Backward& f, const Sequence& sequence, int64_t b, int64_t hk, int64_t begin, int64_t end);
  /// Takes up queries [first, last) of a head, at most plan.rows.
  void take_queries(const Backward& f, int64_t head, int64_t first, int64_t last);
  /// Adds what the queries do to dk, dv and dbias; returns their dq, (rows, headdim padded to the width).
  const float* attend(const Backward& f);
  /// d loss / d sink of the queries.
  double sink_gradient(const Backward& f) const;
  /// Writes dk and dv.
  void store(const Backward& f);

 private:
  void use(const Backward& f, const BackwardKernel& kernel);
  bool pack_keys(const Backward& f);
  bool pack_queries(const Backward& f);
  void place_queries(const Backward& f);
  void clear_unseen(const Backward& f) const;

  // Where they are, and what they are.
  Sequence sequence_{};
  int64_t b_ = 0, hk_ = 0, begin_ = 0, end_ = 0;  // keys
  int64_t head_ = 0, first_ = 0, last_ = 0;       // queries
  const BackwardKernel* kernel_ = nullptr;        // that has packed them
  // Keys.
  char* keys_;
  uint8_t* key_special_;
  float *dk_, *dv_, *rows_;  // rows_: either, in rows
  // Queries.
  char *queries_, *scratch_;
  uint8_t* row_special_;
  float *dq_, *base_, *delta_, *slope_;
  int64_t *lo_, *hi_, *position_;  // counted from begin_
  const char** bias_;
  float** dbias_;
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
