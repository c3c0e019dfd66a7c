// RMSNorm, a row at a time, in strips of columns: each is brought to fp32, in L1, before anything is computed. A row is
// read from memory once: where it has several strips, the second pass over it finds it in L1 or L2.

namespace flash_attn::cpu::FLASH_ATTN_ISA {

constexpr int64_t kStripColumns = 1024;
/// Longer than it is used, so that strips do not lie 4 KiB apart: a load waits for an earlier store whose address looks
/// the same in its last 12 bits.
struct Strip {
  alignas(64) float at[kStripColumns + 80];
};
constexpr int kSums = 4;  // independent chains of additions: each would wait for its last result

/// body(first, columns) for all strips of a row.
template <class Body>
FLASH_ATTN_INLINE void for_strips(int64_t cols, const Body& body) {
  for (int64_t first = 0; first < cols; first += kStripColumns)
    body(first, cols - first < kStripColumns ? cols - first : kStripColumns);
}

/// body(c, chain, count) for every vector of n columns: whole ones have the constant count W.
template <class Body>
FLASH_ATTN_INLINE void for_vectors(int64_t n, const Body& body) {
  int64_t c = 0;
  for (; c + kSums * W <= n; c += kSums * W)
#pragma GCC unroll 4
    for (int i = 0; i < kSums; ++i) body(c + i * W, i, W);
  for (; c + W <= n; c += W) body(c, 0, W);
  if (c < n) body(c, 0, n - c);
}

FLASH_ATTN_INLINE char* columns_of(const Rows& rows, int64_t r, int64_t first) {
  return rows.data + (r * rows.stride + first) * bytes_of(rows.dtype);
}

/// Columns [first, first + n) of row r -> strip.
FLASH_ATTN_INLINE void read_strip(const Rows& rows, int64_t r, int64_t first, int64_t n, Strip& strip) {
  const char* const p = columns_of(rows, r, first);
  with_dtype(rows.dtype, [&](auto type) {
    constexpr DType kType = decltype(type)::value;
    for_vectors(n, [&](int64_t c, int, int64_t count) {
      store(strip.at + c, load_as_float(p + c * bytes_of(kType), kType, 1, count));
    });
  });
}

/// The same columns, x: adds term(c, x) for all vectors c of them.
template <class Term>
FLASH_ATTN_INLINE void fold(const Rows& rows, int64_t r, int64_t first, int64_t n, vf (&sums)[kSums],
                            const Term& term) {
  const char* const p = columns_of(rows, r, first);
  with_dtype(rows.dtype, [&](auto type) {
    constexpr DType kType = decltype(type)::value;
    vf here[kSums]{};  // in registers
    for_vectors(n, [&](int64_t c, int chain, int64_t count) {
      here[chain] += term(c, load_as_float(p + c * bytes_of(kType), kType, 1, count));
    });
    for (int i = 0; i < kSums; ++i) sums[i] += here[i];
  });
}
FLASH_ATTN_INLINE float total(const vf (&sums)[kSums]) { return sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3])); }

/// value(c) for all vectors -> the columns, rounded once.
template <class Value>
FLASH_ATTN_INLINE void write_columns(const Rows& rows, int64_t r, int64_t first, int64_t n, const Value& value) {
  char* const p = columns_of(rows, r, first);
  with_dtype(rows.dtype, [&](auto type) {
    constexpr DType kType = decltype(type)::value;
    for_vectors(n, [&](int64_t c, int, int64_t count) {
      store_from_float(p + c * bytes_of(kType), value(c), kType, 1, count);
    });
  });
}

/// Memory that the next pass reads or writes, to be asked for while this one computes: a pass waits for its first lines
/// otherwise, and a row has two. Behind the last row nothing is asked for.
struct Wanted {
  const char* row;
  int64_t size;
  FLASH_ATTN_INLINE Wanted(const Rows& rows, int64_t r, int64_t count)
      : row(rows.data && r < count ? columns_of(rows, r, 0) : nullptr), size(bytes_of(rows.dtype)) {}
  FLASH_ATTN_INLINE void read(int64_t c) const {
    if (row) __builtin_prefetch(row + c * size, 0, 2);
  }
  FLASH_ATTN_INLINE void write(int64_t c) const {
    if (row) __builtin_prefetch(row + c * size, 1, 3);
  }
};

inline void norm_rows(const NormRows& task) {
  const int64_t cols = task.cols;
  const float* const weight = task.weight;
  Strip h;
  for (int64_t r = 0; r < task.rows; ++r) {
    const Wanted y(task.y, r, task.rows), next(task.x, r + 1, task.rows),
        next_residual(task.residual, r + 1, task.rows);
    vf squares[kSums]{};
    const auto read = [&](int64_t first, int64_t n) {  // and adds the squares, of which the second time nobody asks
      const auto square = [&](int64_t c, vf x) {
        store(h.at + c, x);
        y.write(first + c);
        return x * x;
      };
      if (!task.residual.data) return fold(task.x, r, first, n, squares, square);
      read_strip(task.x, r, first, n, h);
      fold(task.residual, r, first, n, squares, [&](int64_t c, vf x) { return square(c, load(h.at + c) + x); });
    };
    for_strips(cols, [&](int64_t first, int64_t n) {
      read(first, n);
      if (task.h.data) write_columns(task.h, r, first, n, [&](int64_t c) { return load(h.at + c); });
    });
    const float rstd = 1.0f / __builtin_sqrtf(total(squares) / static_cast<float>(cols) + task.eps);
    task.rstd[r] = rstd;
    for_strips(cols, [&](int64_t first, int64_t n) {
      if (cols > kStripColumns) read(first, n);
      write_columns(task.y, r, first, n, [&](int64_t c) {
        next.read(first + c), next_residual.read(first + c);
        return load(h.at + c) * rstd * load(weight + first + c);
      });
    });
  }
}

inline void norm_gradient_rows(const NormGradientRows& task) {
  const int64_t cols = task.cols;
  const float* const weight = task.weight;
  Strip g, h;
  for (int64_t r = 0; r < task.rows; ++r) {
    const Wanted dh(task.dh[0], r, task.rows), dstream(task.dstream, r, task.rows), next_dy(task.dy, r + 1, task.rows),
        next_h(task.h, r + 1, task.rows);
    const float rstd = task.rstd[r];
    vf dots[kSums]{};
    for_strips(cols, [&](int64_t first, int64_t n) {
      read_strip(task.dy, r, first, n, g);
      fold(task.h, r, first, n, dots, [&](int64_t c, vf x) {
        float* const dweight = task.dweight + first + c;
        dh.write(first + c), dstream.read(first + c);
        const vf t = load(g.at + c) * x;
        store(h.at + c, x);
        store(dweight, load(dweight) + t * rstd);
        return t * load(weight + first + c);
      });
    });
    const float along = total(dots) / static_cast<float>(cols) * rstd * rstd;
    for_strips(cols, [&](int64_t first, int64_t n) {
      if (cols > kStripColumns) read_strip(task.dy, r, first, n, g), read_strip(task.h, r, first, n, h);
      const auto gradient = [&](int64_t c) {
        next_dy.read(first + c), next_h.read(first + c);
        return (load(g.at + c) * load(weight + first + c) - load(h.at + c) * along) * rstd;
      };
      if (!task.dstream.data && !task.dh[1].data) return write_columns(task.dh[0], r, first, n, gradient);
      for_vectors(n, [&](int64_t c, int, int64_t) { store(g.at + c, gradient(c)); });
      if (task.dstream.data) {
        vf unused[kSums]{};
        fold(task.dstream, r, first, n, unused, [&](int64_t c, vf x) {
          store(g.at + c, load(g.at + c) + x);
          return vf{};
        });
      }
      for (const Rows& dh : task.dh)
        if (dh.data) write_columns(dh, r, first, n, [&](int64_t c) { return load(g.at + c); });
    });
  }
}

/// A row in fp32, plus `add`; zeros (plus `add`) up to a whole vector.
inline void read_row(const Rows& row, int64_t cols, float add, float* to) {
  with_dtype(row.dtype, [&](auto type) {
    constexpr DType kType = decltype(type)::value;
    for (int64_t c = 0; c < cols; c += W)
      store(to + c, load_as_float(row.data + c * bytes_of(kType), kType, 1, cols - c) + add);
  });
}

/// Columns of the sum of `parts` rows, one after the other, rounded once.
inline void sum_parts(const float* rows, int64_t parts, int64_t ld, int64_t cols, const Rows& to) {
  for_strips(cols, [&](int64_t first, int64_t n) {
    Strip sum{};
    for (int64_t i = 0; i < parts; ++i)
      for (int64_t c = 0; c < n; c += W) store(sum.at + c, load(sum.at + c) + load(rows + i * ld + first + c));
    write_columns(to, 0, first, n, [&](int64_t c) { return load(sum.at + c); });
  });
}

}  // namespace flash_attn::cpu::FLASH_ATTN_ISA
