// Rotary embedding: a row of all heads, turned by the angles of its position. The angles are brought to fp32 once for
// all heads. Per vector of W pairs: two loads, two stores and four multiplications between them, so memory bounds it.

namespace flash_attn::cpu::FLASH_ATTN_ISA {

/// Angles of up to kStripPairs pairs. Interleaved: every number twice, and the sine negated for the first of a pair.
constexpr int64_t kStripPairs = 128;
struct AngleStrip {
  alignas(64) float cos[2 * kStripPairs], sin[2 * kStripPairs];
};

inline void load_angles(const RowAngles& angles, int64_t first, int64_t n, AngleStrip& strip) {
  const auto load_table = [&](const char* table, DType dtype, int64_t stride, float sign, float* to) {
    const int64_t size = bytes_of(dtype);
    for (int64_t i = 0; i < n; i += W)
      store(to + i, load_as_float(table + (first + i) * stride * size, dtype, stride, n - i) * sign);
  };
  load_table(angles.cos, angles.cos_dtype, angles.cos_stride, 1.0f, strip.cos);
  load_table(angles.sin, angles.sin_dtype, angles.sin_stride, angles.conjugate ? -1.0f : 1.0f, strip.sin);
  if (!angles.interleaved) return;
  for (int64_t i = n - 1; i >= 0; --i) {
    const float c = strip.cos[i], s = strip.sin[i];
    strip.cos[2 * i] = c, strip.cos[2 * i + 1] = c;
    strip.sin[2 * i] = -s, strip.sin[2 * i + 1] = s;
  }
}

template <int... kLane>
FLASH_ATTN_INLINE vf swap_neighbours(vf x, std::integer_sequence<int, kLane...>) {
  return __builtin_shufflevector(x, x, (kLane ^ 1)...);
}

/// Where a row of one head comes from and goes to; strides in elements.
struct HeadRow {
  const char* from;
  char* into;
  int64_t from_col, into_col;
};

/// Pairs (first + i, first + i + pairs), i < n. A vector of both is read before either is written: it may be in place.
template <DType kType>
FLASH_ATTN_INLINE void rotate_halves(const HeadRow& row, int64_t pairs, int64_t first, int64_t n,
                                     const AngleStrip& strip) {
  const int64_t size = bytes_of(kType), from = row.from_col * size, into = row.into_col * size;
  const char *a = row.from + first * from, *b = a + pairs * from;
  char *to_a = row.into + first * into, *to_b = to_a + pairs * into;
  const auto turn = [&](int64_t i, int64_t from_col, int64_t into_col, int64_t count) {
    const vf x = load_as_float(a + i * from, kType, from_col, count),
             y = load_as_float(b + i * from, kType, from_col, count);
    const vf c = load(strip.cos + i), s = load(strip.sin + i);
    store_from_float(to_a + i * into, x * c - y * s, kType, into_col, count);
    store_from_float(to_b + i * into, x * s + y * c, kType, into_col, count);
  };
  int64_t i = 0;
  if (row.from_col == 1 && row.into_col == 1)
    for (; i + W <= n; i += W) turn(i, 1, 1, W);
  for (; i < n; i += W) turn(i, row.from_col, row.into_col, n - i);
}

/// Columns [2 first, 2 (first + n)).
template <DType kType>
FLASH_ATTN_INLINE void rotate_neighbours(const HeadRow& row, int64_t first, int64_t n, const AngleStrip& strip) {
  const int64_t size = bytes_of(kType), from = row.from_col * size, into = row.into_col * size;
  const char* x = row.from + 2 * first * from;
  char* to = row.into + 2 * first * into;
  const auto turn = [&](int64_t c, int64_t from_col, int64_t into_col, int64_t count) {
    const vf y = load_as_float(x + c * from, kType, from_col, count);
    const vf swapped = swap_neighbours(y, std::make_integer_sequence<int, W>{});
    store_from_float(to + c * into, y * load(strip.cos + c) + swapped * load(strip.sin + c), kType, into_col, count);
  };
  int64_t c = 0;
  if (row.from_col == 1 && row.into_col == 1)
    for (; c + W <= 2 * n; c += W) turn(c, 1, 1, W);
  for (; c < 2 * n; c += W) turn(c, row.from_col, row.into_col, 2 * n - c);
}

inline void move_row(const RowMove& m) {
  const int64_t size = bytes_of(m.dtype), pairs = m.angles.pairs;
  const auto head = [&](int64_t h) {
    return HeadRow{m.from + h * m.from_head * size, m.into + h * m.into_head * size, m.from_col, m.into_col};
  };
  AngleStrip strip;
  for (int64_t first = 0; first < pairs; first += kStripPairs) {
    const int64_t n = pairs - first < kStripPairs ? pairs - first : kStripPairs;
    load_angles(m.angles, first, n, strip);
    with_dtype(m.dtype, [&](auto type) {
      constexpr DType kType = decltype(type)::value;
      for (int64_t h = 0; h < m.heads; ++h)
        if (m.angles.interleaved)
          rotate_neighbours<kType>(head(h), first, n, strip);
        else
          rotate_halves<kType>(head(h), pairs, first, n, strip);
    });
  }
  const int64_t rest = m.cols - 2 * pairs;
  if (m.from == m.into || rest == 0) return;
  for (int64_t h = 0; h < m.heads; ++h) {
    const HeadRow row = head(h);
    const int64_t step = m.from_col == 1 && m.into_col == 1 ? rest : 1;
    for (int64_t c = 2 * pairs; c < m.cols; c += step)
      std::memcpy(row.into + c * m.into_col * size, row.from + c * m.from_col * size,
                  static_cast<std::size_t>(step * size));
  }
}

}  // namespace flash_attn::cpu::FLASH_ATTN_ISA
