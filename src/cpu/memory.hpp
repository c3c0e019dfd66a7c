// The caller's tensors: where rows lie, how they are written, cleared and asked for.
#pragma once

#include <cstdint>
#include <vector>

#include "core/problem.hpp"
#include "cpu/kernels.hpp"

namespace flash_attn::cpu {

/// Addresses of keys [first, first + n) of head `head` of one sequence; a page is looked up once, not once per key.
void key_rows(const Problem& p, const Operand& x, const Sequence& s, int64_t head, int64_t first, int64_t n,
              const char** rows);

/// The same keys, and n queries of a head from `first` on, of `cols` columns, as memory to ask for.
void ask_keys(const Problem& p, const Operand& x, const Sequence& s, int64_t head, int64_t n, int64_t cols,
              std::vector<Ahead>& ahead);
void ask_queries(const Operand& x, const Sequence& s, int64_t head, int64_t n, int64_t cols, std::vector<Ahead>& ahead);

/// batches x rows x heads rows of `cols` elements, all bits zero.
void clear(const Operand& x, int64_t batches, int64_t rows, int64_t heads, int64_t cols);

/// Rows that no task writes (they belong to no sequence, or theirs has no queries or no keys): before the tasks, the
/// outputs are cleared as a whole if there are any. out, dq, dk, dv: 0; lse: what a row that sees nothing has.
void clear_if_uncovered(const Problem& p);

/// Asks the system for huge pages where the results of the pass fill whole ones. Fresh memory of 32 MiB is 8192 pages
/// to fault in, one at a time; that took two thirds of a forward of 64 x 8 heads of 128 x 128 x 128.
void advise_huge_pages(const Problem& p);

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
