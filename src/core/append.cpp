// Rows of new keys, values and queries: copied, or rotated in fp32 (fp64) and rounded once.
#include "core/append.hpp"

#include <algorithm>
#include <cstring>
#include <vector>

#include "core/half.hpp"

namespace flash_attn {
namespace {

constexpr int64_t kBlockRows = 32;

struct F16 {
  using Bits = uint16_t;
  using Real = float;
  static float load(uint16_t x) { return f16_to_float(x); }
  static uint16_t round(float x) { return f16_from_float(x); }
};
struct Bf16 {
  using Bits = uint16_t;
  using Real = float;
  static float load(uint16_t x) { return bf16_to_float(x); }
  static uint16_t round(float x) { return bf16_from_float(x); }
};
template <class T>
struct Plain {
  using Bits = T;
  using Real = T;
  static T load(T x) { return x; }
  static T round(T x) { return x; }
};

template <class Body>
void with_type(DType t, const Body& body) {
  switch (t) {
    case DType::f16: return body(F16{});
    case DType::bf16: return body(Bf16{});
    case DType::f64: return body(Plain<double>{});
    default: return body(Plain<float>{});
  }
}

/// One row of `cols` elements of one head.
struct Row {
  char* data;
  int64_t stride;  // in elements
};

template <class T>
T* element(const Row& row, int64_t c) {
  return reinterpret_cast<T*>(row.data) + c * row.stride;
}

template <class Bits>
void copy(const Row& from, const Row& to, int64_t first, int64_t cols) {
  if (from.stride == 1 && to.stride == 1) {
    std::memcpy(element<Bits>(to, first), element<Bits>(from, first),
                static_cast<std::size_t>(cols - first) * sizeof(Bits));
    return;
  }
  for (int64_t c = first; c < cols; ++c) *element<Bits>(to, c) = *element<Bits>(from, c);
}

/// cos and sin of one position, for the pairs of a row.
template <class Real>
std::vector<Real> angles(const Operand& table, int64_t position, int64_t pairs) {
  std::vector<Real> x(static_cast<std::size_t>(pairs));
  if (pairs == 0) return x;
  with_type(table.dtype, [&](auto type) {
    using Type = decltype(type);
    const Row row{table.at(0, position, 0), table.stride_col};
    for (int64_t i = 0; i < pairs; ++i)
      x[static_cast<std::size_t>(i)] = static_cast<Real>(Type::load(*element<typename Type::Bits>(row, i)));
  });
  return x;
}

/// A row of all heads.
struct Place {
  const Operand& x;
  int64_t batch, row;
  Row head(int64_t h) const { return {x.at(batch, row, h), x.stride_col}; }
};

/// A row of `cols` columns goes from one place to another, rotated to `position` unless it is negative.
template <class Type>
void move_row(const Append& append, int64_t position, const Place& source, const Place& target, int64_t heads,
              int64_t cols) {
  using Bits = typename Type::Bits;
  using Real = typename Type::Real;
  const int64_t pairs = position < 0 ? 0 : append.rotary_dim / 2;
  const std::vector<Real> cos = angles<Real>(append.cos, position, pairs),
                          sin = angles<Real>(append.sin, position, pairs);
  for (int64_t h = 0; h < heads; ++h) {
    const Row from = source.head(h), into = target.head(h);
    for (int64_t i = 0; i < pairs; ++i) {
      const int64_t a = append.interleaved ? 2 * i : i, b = append.interleaved ? a + 1 : i + pairs;
      const Real p = Type::load(*element<Bits>(from, a)), q = Type::load(*element<Bits>(from, b));
      const Real c = cos[static_cast<std::size_t>(i)], s = sin[static_cast<std::size_t>(i)];
      *element<Bits>(into, a) = Type::round(p * c - q * s);
      *element<Bits>(into, b) = Type::round(p * s + q * c);
    }
    copy<Bits>(from, into, 2 * pairs, cols);
  }
}

int64_t blocks_of(int64_t rows) { return (rows + kBlockRows - 1) / kBlockRows; }
int64_t key_blocks(const Problem& p) { return blocks_of(p.append.max_rows); }

void append_keys(const Problem& p, int64_t b, int64_t first, int64_t last) {
  const Append& append = p.append;
  const SequenceTable& t = p.sequences;
  const Sequence s = t.at(b);
  const int64_t batch = t.cu_seqlens_new ? 0 : b, start = t.cu_seqlens_new ? t.cu_seqlens_new[b] : 0;
  for (int64_t i = first; i < last; ++i) {
    const int64_t row = t.used(b) + i, position = append.rotates() ? first_position(p, b) + i : -1;
    const KeyRun at = s.key_run(row, t.page_size);
    with_type(p.dtype, [&](auto type) {
      using Type = decltype(type);
      move_row<Type>(append, position, {append.k, batch, start + i}, {p.k, at.batch, at.row}, p.nheads_k, p.headdim);
      move_row<Type>(append, -1, {append.v, batch, start + i}, {p.v, at.batch, at.row}, p.nheads_k, p.headdim_v);
    });
  }
}

void rotate_queries(const Problem& p, const Operand& q, int64_t b, int64_t first, int64_t last) {
  const Sequence s = p.sequences.at(b);
  for (int64_t i = first; i < last; ++i) {
    const int64_t row = s.q_row + i, position = first_position(p, b) + (queries_advance(p) ? i : 0);
    with_type(p.dtype, [&](auto type) {
      move_row<decltype(type)>(p.append, position, {p.q, s.q_batch, row}, {q, s.q_batch, row}, p.nheads, p.headdim);
    });
  }
}

}  // namespace

void append_all(const Problem& p, const Operand& q) {
  for (int64_t i = 0, n = append_blocks(p); i < n; ++i) append_block(p, q, i);
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

void append_block(const Problem& p, const Operand& q, int64_t block) {
  const int64_t of_keys = key_blocks(p), each = append_blocks(p) / p.batch;
  const int64_t b = block / each, i = block % each;
  const bool is_keys = i < of_keys;
  const int64_t first = (is_keys ? i : i - of_keys) * kBlockRows;
  const int64_t rows = is_keys ? p.sequences.new_keys(b) : p.sequences.at(b).seqlen_q;
  const int64_t last = std::min(first + kBlockRows, rows);
  is_keys ? append_keys(p, b, first, last) : rotate_queries(p, q, b, first, last);
}

}  // namespace flash_attn
