// Rows of new keys, values and queries: copied, or rotated.
#include "core/append.hpp"

#include <algorithm>

namespace flash_attn {
namespace {

constexpr int64_t kBlockRows = 32;

/// A row of all heads.
struct Place {
  const Operand& x;
  int64_t batch, row;
  char* data() const { return x.at(batch, row, 0); }
};

/// A row of `cols` columns goes from one place to another, rotated to `position` unless it is negative.
void move_to(MoveRow move, const Append& append, int64_t position, const Place& source, const Place& target,
             int64_t heads, int64_t cols) {
  RowMove row{.dtype = source.x.dtype,
              .heads = heads,
              .cols = cols,
              .from = source.data(),
              .into = target.data(),
              .from_head = source.x.stride_head,
              .from_col = source.x.stride_col,
              .into_head = target.x.stride_head,
              .into_col = target.x.stride_col,
              .angles = {}};
  if (position >= 0)
    row.angles = {.cos = append.cos.at(0, position, 0),
                  .sin = append.sin.at(0, position, 0),
                  .cos_dtype = append.cos.dtype,
                  .sin_dtype = append.sin.dtype,
                  .cos_stride = append.cos.stride_col,
                  .sin_stride = append.sin.stride_col,
                  .pairs = append.rotary_dim / 2,
                  .interleaved = append.interleaved};
  move(row);
}

int64_t blocks_of(int64_t rows) { return (rows + kBlockRows - 1) / kBlockRows; }
int64_t key_blocks(const Problem& p) { return blocks_of(p.append.max_rows); }

void append_keys(const Problem& p, MoveRow move, int64_t b, int64_t first, int64_t last) {
  const Append& append = p.append;
  const SequenceTable& t = p.sequences;
  const Sequence s = t.at(b);
  const int64_t batch = t.cu_seqlens_new ? 0 : b, start = t.cu_seqlens_new ? t.cu_seqlens_new[b] : 0;
  for (int64_t i = first; i < last; ++i) {
    const int64_t row = t.used(b) + i, position = append.rotates() ? first_position(p, b) + i : -1;
    const KeyRun at = s.key_run(row, t.page_size);
    move_to(move, append, position, {append.k, batch, start + i}, {p.k, at.batch, at.row}, p.nheads_k, p.headdim);
    move_to(move, append, -1, {append.v, batch, start + i}, {p.v, at.batch, at.row}, p.nheads_k, p.headdim_v);
  }
}

void rotate_queries(const Problem& p, const Operand& q, MoveRow move, int64_t b, int64_t first, int64_t last) {
  const Sequence s = p.sequences.at(b);
  for (int64_t i = first; i < last; ++i) {
    const int64_t row = s.q_row + i, position = first_position(p, b) + (queries_advance(p) ? i : 0);
    move_to(move, p.append, position, {p.q, s.q_batch, row}, {q, s.q_batch, row}, p.nheads, p.headdim);
  }
}

}  // namespace

void append_all(const Problem& p, const Operand& q) {
  for (int64_t i = 0, n = append_blocks(p); i < n; ++i) append_block(p, q, i, move_row);
}

RotatedQueries::RotatedQueries(const Problem& p) : q_(p.q) {
  if (!p.append.rotates()) return;
  const int64_t elements = p.batch_q * p.rows_q * p.nheads * p.headdim;
  memory_ = std::make_unique_for_overwrite<char[]>(static_cast<std::size_t>(elements) * size_of(p.dtype));
  q_.data = memory_.get();
  q_.stride_col = 1, q_.stride_head = p.headdim, q_.stride_row = p.nheads * p.headdim;
  q_.stride_batch = p.rows_q * q_.stride_row;
}

Problem RotatedQueries::attend_after(const Problem& p) const {
  Problem rest = p;
  rest.q = q_;
  rest.append = {};
  return rest;
}

int64_t append_blocks(const Problem& p) {
  return p.batch * (key_blocks(p) + (p.append.rotates() ? blocks_of(p.max_seqlen_q) : 0));
}

void append_block(const Problem& p, const Operand& q, int64_t block, MoveRow move) {
  const int64_t of_keys = key_blocks(p), each = append_blocks(p) / p.batch;
  const int64_t b = block / each, i = block % each;
  const bool is_keys = i < of_keys;
  const int64_t first = (is_keys ? i : i - of_keys) * kBlockRows;
  const int64_t rows = is_keys ? p.sequences.new_keys(b) : p.sequences.at(b).seqlen_q;
  const int64_t last = std::min(first + kBlockRows, rows);
  is_keys ? append_keys(p, move, b, first, last) : rotate_queries(p, q, move, b, first, last);
}

}  // namespace flash_attn
