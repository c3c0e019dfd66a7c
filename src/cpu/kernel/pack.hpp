// Packing: rows of any dtype and stride -> fp32 panels and strips (layouts in kernels.hpp); rows in and out.
//
// A packed element is read rows / 6 times from L1 or L2 at full vector width; packing costs it about half a cycle once.

namespace flash_attn::cpu::FLASH_ATTN_ISA {

FLASH_ATTN_INLINE int64_t bytes_of(DType t) { return t == DType::f32 ? 4 : 2; }

FLASH_ATTN_INLINE vf load_columns(const RowList& rows, int64_t r, int64_t c) {
  const char* p = rows.row[r];
  if (!p) return vf{};
  return load_as_float(p + c * rows.stride_col * bytes_of(rows.dtype), rows.dtype, rows.stride_col, rows.cols - c);
}

/// x * 0 is NaN for an inf or a NaN and 0 for all else: summing it finds them at one FMA a vector.
FLASH_ATTN_INLINE bool has_special(vf zeros) {
  const float s = sum_lanes(zeros);
  return s != s;
}

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

inline bool pack_panel(const RowList& rows, float* panel) {
  vf zeros{};
  for (int64_t r0 = 0; r0 < kPanel; r0 += W) {
    for (int64_t c = 0; c < rows.cols; c += W) {
      vf x[W];
      for (int i = 0; i < W; ++i) {
        x[i] = r0 + i < rows.rows ? load_columns(rows, r0 + i, c) : vf{};
        zeros += x[i] * 0.0f;
      }
      transpose(x);
      const int64_t n = rows.cols - c < W ? rows.cols - c : W;
      for (int64_t i = 0; i < n; ++i) store(panel + (c + i) * kPanel + r0, x[i]);
    }
  }
  return has_special(zeros);
}

inline bool pack_strips(const RowList& rows, float* strips, int64_t rows_pad, int64_t first) {
  vf zeros{};
  for (int64_t c0 = 0; c0 < rows.cols; c0 += kPanel) {
    const int64_t left = rows.cols - c0;
    const int64_t width = left >= kPanel ? kPanel : (left + W - 1) / W * W;
    float* to = strips + c0 * rows_pad + first * width;
    for (int64_t r = 0; r < rows.rows; ++r, to += width)
      for (int64_t c = 0; c < width; c += W) {
        const vf x = load_columns(rows, r, c0 + c);
        zeros += x * 0.0f;
        store(to + c, x);
      }
  }
  return has_special(zeros);
}

inline bool load_rows(const RowList& rows, float factor, float* dst, int64_t ld) {
  vf zeros{};
  for (int64_t r = 0; r < rows.rows; ++r)
    for (int64_t c = 0; c < rows.cols; c += W) {
      const vf x = load_columns(rows, r, c);
      zeros += x * 0.0f;
      store_from_float(reinterpret_cast<char*>(dst + r * ld + c), x * factor, DType::f32, 1, rows.cols - c);
    }
  return has_special(zeros);
}

inline void dot_rows(const RowList& rows, const float* x, int64_t ld, float* dots) {
  for (int64_t r = 0; r < rows.rows; ++r) {
    vf sum{};
    for (int64_t c = 0; c < rows.cols; c += W) {
      const vf xr = load_as_float(reinterpret_cast<const char*>(x + r * ld + c), DType::f32, 1, rows.cols - c);
      sum += load_columns(rows, r, c) * xr;
    }
    dots[r] = sum_lanes(sum);
  }
}

inline void store_rows(const RowList& rows, const float* factor, const float* src, int64_t ld) {
  const int64_t size = bytes_of(rows.dtype);
  for (int64_t r = 0; r < rows.rows; ++r)
    for (int64_t c = 0; c < rows.cols; c += W)
      store_from_float(const_cast<char*>(rows.row[r]) + c * rows.stride_col * size, load(src + r * ld + c) * factor[r],
                       rows.dtype, rows.stride_col, rows.cols - c);
}

}  // namespace flash_attn::cpu::FLASH_ATTN_ISA
