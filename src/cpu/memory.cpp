#include "cpu/memory.hpp"

#include <algorithm>
#include <cstring>

#include "cpu/system.hpp"
#include "cpu/units.hpp"

namespace flash_attn::cpu {

void key_rows(const Problem& p, const Operand& x, const Sequence& s, int64_t head, int64_t first, int64_t n,
              const char** rows) {
  const int64_t step = x.stride_row * static_cast<int64_t>(size_of(x.dtype));
  for (int64_t done = 0; done < n;) {
    const KeyRun at = s.key_run(s.k_row + first + done, p.sequences.page_size);
    const int64_t run = std::min(n - done, at.run);
    const char* row = x.at(at.batch, at.row, head);
    for (int64_t i = 0; i < run; ++i, row += step) rows[done + i] = row;
    done += run;
  }
}

static void ask(const char* first, const Operand& x, int64_t rows, int64_t cols, std::vector<Ahead>& ahead) {
  const auto size = static_cast<int64_t>(size_of(x.dtype));
  if (rows > 0 && x.stride_col == 1) ahead.push_back({first, rows, x.stride_row * size, cols * size});
}

void ask_keys(const Problem& p, const Operand& x, const Sequence& s, int64_t head, int64_t n, int64_t cols,
              std::vector<Ahead>& ahead) {
  for (int64_t done = 0; done < n;) {
    const KeyRun at = s.key_run(s.k_row + done, p.sequences.page_size);
    const int64_t run = std::min(n - done, at.run);
    ask(x.at(at.batch, at.row, head), x, run, cols, ahead);
    done += run;
  }
}

void ask_queries(const Operand& x, const Sequence& s, int64_t head, int64_t n, int64_t cols,
                 std::vector<Ahead>& ahead) {
  ask(x.at(s.q_batch, s.q_row, head), x, n, cols, ahead);
}

void clear(const Operand& x, int64_t batches, int64_t rows, int64_t heads, int64_t cols) {
  const auto size = static_cast<int64_t>(size_of(x.dtype));
  for (int64_t b = 0; b < batches; ++b)
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t h = 0; h < heads; ++h) {
        char* to = x.at(b, r, h);
        if (x.stride_col == 1)
          std::memset(to, 0, static_cast<std::size_t>(cols * size));
        else
          for (int64_t c = 0; c < cols; ++c)
            std::memset(to + c * x.stride_col * size, 0, static_cast<std::size_t>(size));
      }
}

static void clear_forward(const Problem& p) {
  clear(p.out, p.batch_q, p.rows_q, p.nheads, p.headdim_v);
  if (!p.lse.present()) return;
  for (int64_t b = 0; b < p.batch_q; ++b)
    for (int64_t r = 0; r < p.rows_q; ++r)
      for (int64_t h = 0; h < p.nheads; ++h) *reinterpret_cast<float*>(p.lse.at(b, r, h)) = p.empty_lse();
  if (!p.scores.sink.present()) return;
  for (int64_t b = 0; b < p.batch; ++b) {  // queries without keys still have the sink
    const Sequence s = p.sequences.at(b);
    for (int64_t i = 0; i < s.seqlen_q; ++i)
      for (int64_t h = 0; h < p.nheads; ++h)
        *reinterpret_cast<float*>(p.lse.at(s.q_batch, s.q_row + i, h)) = static_cast<float>(sink_logit(p.scores, h));
  }
}

void clear_if_uncovered(const Problem& p) {
  int64_t covered_q = 0, covered_k = 0;
  for (int64_t b = 0; b < p.batch; ++b) {
    const Sequence s = p.sequences.at(b);
    if (s.empty()) continue;
    covered_q += s.seqlen_q;
    covered_k += s.seqlen_k;
  }
  const bool all_q = covered_q == p.batch_q * p.rows_q, all_k = covered_k == p.batch_k * p.rows_k;
  if (p.pass == Pass::forward) {
    if (!all_q) clear_forward(p);
    return;
  }
  if (!all_q) clear(p.dq, p.batch_q, p.rows_q, p.nheads, p.headdim);
  if (all_k) return;
  clear(p.dk, p.batch_k, p.rows_k, p.nheads_k, p.headdim);
  clear(p.dv, p.batch_k, p.rows_k, p.nheads_k, p.headdim_v);
}

static void advise_huge_pages(const Operand& x, int64_t batches, int64_t rows, int64_t heads, int64_t cols) {
  constexpr int64_t kPage = int64_t{2} << 20;
  if (!x.present() || batches * rows * heads * cols == 0) return;
  const int64_t last = (batches - 1) * x.stride_batch + (rows - 1) * x.stride_row + (heads - 1) * x.stride_head +
                       (cols - 1) * x.stride_col;
  if (x.stride_col != 1 || last + 1 != batches * rows * heads * cols) return;  // memory between its rows is not its own
  const auto size = static_cast<int64_t>(size_of(x.dtype));
  const std::intptr_t begin = reinterpret_cast<std::intptr_t>(x.data), end = begin + (last + 1) * size;
  const std::intptr_t first = (begin + kPage - 1) / kPage * kPage, beyond = end / kPage * kPage;
  if (beyond - first >= 2 * kPage)
    advise_huge_pages(static_cast<char*>(x.data) + (first - begin), static_cast<std::size_t>(beyond - first));
}

void advise_huge_pages(const Problem& p) {
  if (p.pass == Pass::forward) return advise_huge_pages(p.out, p.batch_q, p.rows_q, p.nheads, p.headdim_v);
  advise_huge_pages(p.dq, p.batch_q, p.rows_q, p.nheads, p.headdim);
  advise_huge_pages(p.dk, p.batch_k, p.rows_k, p.nheads_k, p.headdim);
  advise_huge_pages(p.dv, p.batch_k, p.rows_k, p.nheads_k, p.headdim_v);
}

}  // namespace flash_attn::cpu
