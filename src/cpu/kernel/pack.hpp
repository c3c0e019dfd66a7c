// Packing: rows of any dtype and stride -> fp32 panels and strips; rows in and out.
//
//   panels: [rows / P][cols][P]      P rows side by side, transposed: B operand of  X . rows^T
//   strips: [cols / P][rows_pad][P]  P columns side by side:          B operand of  X . rows   (the last one narrower)
//
// P = kPanel. Rows are padded with zeros to a multiple of the width, columns of strips too; what lies between padded
// rows and P is not read. Each function returns whether there is an inf or a NaN.
//
// A packed element is read rows / 6 times from L1 or L2 at full vector width; packing costs it about half a cycle once.

namespace flash_attn::cpu::FLASH_ATTN_ISA {

FLASH_ATTN_INLINE int64_t bytes_of(DType t) { return t == DType::f64 ? 8 : t == DType::f32 ? 4 : 2; }

/// A dtype that loops are compiled for.
template <DType kType>
struct Typed {
  static constexpr DType value = kType;
};
template <class Body>
FLASH_ATTN_INLINE void with_dtype(DType t, const Body& body) {
  if (t == DType::f32) return body(Typed<DType::f32>{});
  if (t == DType::bf16) return body(Typed<DType::bf16>{});
  body(Typed<DType::f16>{});
}

/// Columns [c, c + W) of row r in fp32, zeros beyond the row. One loader per memory layout, chosen once per list.
struct AnyLoader {
  FLASH_ATTN_INLINE vf operator()(const RowList& rows, int64_t r, int64_t c) const {
    const char* p = rows.row[r];
    if (!p) return vf{};
    return load_as_float(p + c * rows.stride_col * bytes_of(rows.dtype), rows.dtype, rows.stride_col, rows.cols - c);
  }
};
/// Columns next to each other.
template <DType kType>
struct RunLoader {
  FLASH_ATTN_INLINE vf operator()(const RowList& rows, int64_t r, int64_t c) const {
    const char* p = rows.row[r];
    if (!p || c + W > rows.cols) return AnyLoader{}(rows, r, c);
    if constexpr (kType == DType::f32) return load(reinterpret_cast<const float*>(p) + c);
    if constexpr (kType == DType::bf16) return from_bf16(load_half(p + 2 * c));
    return from_f16(load_half(p + 2 * c));
  }
};
template <class Body>
FLASH_ATTN_INLINE auto with_loader(const RowList& rows, const Body& body) {
  if (rows.stride_col != 1 || rows.dtype == DType::f64) return body(AnyLoader{});
  if (rows.dtype == DType::f32) return body(RunLoader<DType::f32>{});
  if (rows.dtype == DType::bf16) return body(RunLoader<DType::bf16>{});
  return body(RunLoader<DType::f16>{});
}

/// Looks for an inf or a NaN: by their bits, the largest of all. (Summing x * 0 would wait for every sum.)
class SpecialFinder {
 public:
  FLASH_ATTN_INLINE vf see(vf x) {
    const vi magnitude = as_int(x) & 0x7fffffff;
    largest_ = magnitude > largest_ ? magnitude : largest_;
    return x;
  }
  bool found() const {
    int32_t lanes[W];
    std::memcpy(lanes, &largest_, sizeof lanes);
    int32_t largest = 0;
    for (int i = 0; i < W; ++i) largest = lanes[i] > largest ? lanes[i] : largest;
    return largest >= 0x7f800000;
  }

 private:
  vi largest_{};
};

/// In-register transpose of W vectors of W floats: log2(W) rounds of exchanging blocks of size kHalf.
///   x: a0 a1   y: b0 b1   ->   a0 b0   a1 b1     (each a block of kHalf lanes, all along the vector)
template <int kHalf, int... kLane>
FLASH_ATTN_INLINE void exchange_pair(vf& x, vf& y, std::integer_sequence<int, kLane...>) {
  const vf a = x, b = y;
  x = __builtin_shufflevector(a, b, ((kLane / kHalf) % 2 ? kLane - kHalf + W : kLane)...);
  y = __builtin_shufflevector(a, b, ((kLane / kHalf) % 2 ? kLane + W : kLane + kHalf)...);
}

template <int kHalf>
FLASH_ATTN_INLINE void exchange(vf (&x)[W]) {
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i)
    if ((i / kHalf) % 2 == 0) exchange_pair<kHalf>(x[i], x[i + kHalf], std::make_integer_sequence<int, W>{});
}

FLASH_ATTN_INLINE void transpose(vf (&x)[W]) {
  exchange<1>(x);
  exchange<2>(x);
  if constexpr (W > 4) exchange<4>(x);
  if constexpr (W > 8) exchange<8>(x);
}

/// Lane i: all lanes of x[i] reduced by `op`. As in a transpose blocks are exchanged between pairs, but each pair is
/// reduced at once: 2 (W - 1) shuffles instead of W log2(W).
template <int kHalf, class Op>
FLASH_ATTN_INLINE void reduce_pairs(vf* x, const Op& op) {
#pragma GCC unroll 8
  for (int i = 0; i < W / (2 * kHalf); ++i) {
    vf a = x[2 * i], b = x[2 * i + 1];
    exchange_pair<kHalf>(a, b, std::make_integer_sequence<int, W>{});
    x[i] = op(a, b);
  }
}

template <class Op>
FLASH_ATTN_INLINE vf reduce_each(vf (&x)[W], const Op& op) {
  reduce_pairs<1>(x, op);
  reduce_pairs<2>(x, op);
  if constexpr (W > 4) reduce_pairs<4>(x, op);
  if constexpr (W > 8) reduce_pairs<8>(x, op);
  return x[0];
}

inline bool pack_panel(const RowList& rows, float* panel) {
  return with_loader(rows, [&](const auto& load_columns) {
    SpecialFinder finder;
    for (int64_t r0 = 0; r0 < rows.rows; r0 += W) {
      for (int64_t c = 0; c < rows.cols; c += W) {
        vf x[W];
        for (int i = 0; i < W; ++i) x[i] = r0 + i < rows.rows ? finder.see(load_columns(rows, r0 + i, c)) : vf{};
        transpose(x);
        const int64_t n = rows.cols - c < W ? rows.cols - c : W;
        for (int64_t i = 0; i < n; ++i) store(panel + (c + i) * kPanel + r0, x[i]);
      }
    }
    return finder.found();
  });
}

inline bool pack_strips(const RowList& rows, float* strips, int64_t rows_pad, int64_t first) {
  return with_loader(rows, [&](const auto& load_columns) {
    SpecialFinder finder;
    for (int64_t c0 = 0; c0 < rows.cols; c0 += kPanel) {
      const int64_t left = rows.cols - c0;
      const int64_t width = left >= kPanel ? kPanel : pad_to(left, W);
      float* to = strips + c0 * rows_pad + first * width;
      for (int64_t r = 0; r < rows.rows; ++r, to += width)
        for (int64_t c = 0; c < width; c += W) store(to + c, finder.see(load_columns(rows, r, c0 + c)));
      for (int64_t r = rows.rows; r % W != 0; ++r, to += width)
        for (int64_t c = 0; c < width; c += W) store(to + c, vf{});
    }
    return finder.found();
  });
}

inline bool load_rows(const RowList& rows, float factor, float* dst, int64_t ld) {
  return with_loader(rows, [&](const auto& load_columns) {
    SpecialFinder finder;
    for (int64_t r = 0; r < rows.rows; ++r)
      for (int64_t c = 0; c < rows.cols; c += W) {
        const vf x = finder.see(load_columns(rows, r, c)) * factor;
        if (c + W <= rows.cols)
          store(dst + r * ld + c, x);
        else
          store_from_float(reinterpret_cast<char*>(dst + r * ld + c), x, DType::f32, 1, rows.cols - c);
      }
    return finder.found();
  });
}

inline void dot_rows(const RowList& x, const RowList& y, float* dots) {
  const auto dot_all = [&](const auto& load_columns) {
    for (int64_t r = 0; r < x.rows; r += W) {
      const int64_t count = x.rows - r < W ? x.rows - r : W;
      vf sum[W]{};
      for (int i = 0; i < count; ++i)
        for (int64_t c = 0; c < x.cols; c += W) sum[i] += load_columns(x, r + i, c) * load_columns(y, r + i, c);
      const vf each = reduce_each(sum, [](vf a, vf b) { return a + b; });
      std::memcpy(dots + r, &each, static_cast<std::size_t>(count) * sizeof(float));
    }
  };
  if (x.dtype == y.dtype && y.stride_col == 1)
    with_loader(x, dot_all);
  else
    dot_all(AnyLoader{});
}

inline void store_rows(const RowList& rows, const float* factor, const float* src, int64_t ld) {
  const int64_t size = bytes_of(rows.dtype);
  for (int64_t r = 0; r < rows.rows; ++r)
    for (int64_t c = 0; c < rows.cols; c += W)
      store_from_float(const_cast<char*>(rows.row[r]) + c * rows.stride_col * size, load(src + r * ld + c) * factor[r],
                       rows.dtype, rows.stride_col, rows.cols - c);
}

}  // namespace flash_attn::cpu::FLASH_ATTN_ISA
