// The table of features that verify walks through: each case is one small call that leans on one of them.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace flash_attn::cli {

struct Case {
  std::string name;
  int64_t batch = 2, nheads = 2, nheads_k = 2, seqlen_q = 100, seqlen_k = 100, headdim = 64, headdim_v = 0;

  // Sequences; empty vectors: absent. With lengths, q, k and v are packed; `total_*` may leave rows that belong to
  // none.
  std::vector<int32_t> lengths_q{}, lengths_k{}, seqused_q{}, seqused_k{}, leftpad_k{}, cache_batch_idx{};
  int64_t spare_rows = 0;
  int64_t page_size = 0;
  int64_t cache_batch = 0;  // batch entries of k and v, with cache_batch_idx

  // Scores
  bool causal = false;
  int64_t window_left = -1, window_right = -1, chunk = 0;
  double softmax_scale = 0, softcap = 0;
  bool alibi = false, alibi_per_batch = false, sink = false;
  enum class Bias { none, full, heads, keys } bias = Bias::none;  // (b, h, i, j), (1, h, i, j) or (b, 1, 1, j)
  double dropout = 0;

  // Around the call
  bool heads_first = false;  // memory is (batch, head, row, col)
  bool dlse = false;         // a gradient through lse as well
  bool positive_empty_lse = false;

  int64_t dim_v() const { return headdim_v > 0 ? headdim_v : headdim; }
  bool packed() const { return !lengths_q.empty(); }
  /// Keys that live in a cache have no gradient.
  bool differentiable() const { return page_size == 0 && cache_batch_idx.empty(); }
};

const std::vector<Case>& feature_cases();

}  // namespace flash_attn::cli
