#include "core/row_move.hpp"

#include <cstring>

#include "core/half.hpp"

namespace flash_attn {
namespace {

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
auto with_type(DType t, const Body& body) {
  switch (t) {
    case DType::f16: return body(F16{});
    case DType::bf16: return body(Bf16{});
    case DType::f64: return body(Plain<double>{});
    default: return body(Plain<float>{});
  }
}

template <class Real>
Real angle(const char* table, DType dtype, int64_t i) {
  return with_type(dtype, [&](auto type) {
    using Type = decltype(type);
    return static_cast<Real>(Type::load(reinterpret_cast<const typename Type::Bits*>(table)[i]));
  });
}

template <class Type>
void move(const RowMove& m) {
  using Bits = typename Type::Bits;
  using Real = typename Type::Real;
  const RowAngles& angles = m.angles;
  const Real sign = angles.conjugate ? Real{-1} : Real{1};
  const auto from = [&](int64_t h, int64_t c) {
    return reinterpret_cast<const Bits*>(m.from) + h * m.from_head + c * m.from_col;
  };
  const auto into = [&](int64_t h, int64_t c) {
    return reinterpret_cast<Bits*>(m.into) + h * m.into_head + c * m.into_col;
  };
  for (int64_t i = 0; i < angles.pairs; ++i) {
    const int64_t a = angles.interleaved ? 2 * i : i, b = angles.interleaved ? a + 1 : i + angles.pairs;
    const Real cos = angle<Real>(angles.cos, angles.cos_dtype, i * angles.cos_stride);
    const Real sin = sign * angle<Real>(angles.sin, angles.sin_dtype, i * angles.sin_stride);
    for (int64_t h = 0; h < m.heads; ++h) {
      const Real p = Type::load(*from(h, a)), q = Type::load(*from(h, b));
      *into(h, a) = Type::round(p * cos - q * sin);
      *into(h, b) = Type::round(p * sin + q * cos);
    }
  }
  const int64_t rest = m.cols - 2 * angles.pairs;
  if (m.from == m.into || rest == 0) return;
  for (int64_t h = 0; h < m.heads; ++h) {
    if (m.from_col == 1 && m.into_col == 1)
      std::memcpy(into(h, m.cols - rest), from(h, m.cols - rest), static_cast<std::size_t>(rest) * sizeof(Bits));
    else
      for (int64_t c = m.cols - rest; c < m.cols; ++c) *into(h, c) = *from(h, c);
  }
}

}  // namespace

void move_row(const RowMove& m) {
  with_type(m.dtype, [&](auto type) { move<decltype(type)>(m); });
}

}  // namespace flash_attn
