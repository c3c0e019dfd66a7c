// The short names of the floating dtypes, and what rounding to one of them costs.
#pragma once

#include <optional>
#include <string_view>

#include "core/half.hpp"
#include "flash_attn/tensor.hpp"

namespace flash_attn::cli {

constexpr const char* short_name(DType t) {
  switch (t) {
    case DType::f16: return "fp16";
    case DType::bf16: return "bf16";
    case DType::f32: return "fp32";
    case DType::f64: return "fp64";
    default: return name_of(t);
  }
}

constexpr std::optional<DType> dtype_named(std::string_view name) {
  for (const DType t : {DType::f16, DType::bf16, DType::f32, DType::f64}) {
    if (name == short_name(t) || name == name_of(t)) return t;
  }
  return std::nullopt;
}

/// Half of the distance from 1 to the next number: the relative error of rounding once.
constexpr double unit_roundoff(DType t) {
  switch (t) {
    case DType::f16: return 0x1p-11;
    case DType::bf16: return 0x1p-8;
    case DType::f32: return 0x1p-24;
    default: return 0x1p-53;
  }
}

/// x, rounded once to `t`.
inline float rounded(float x, DType t) {
  switch (t) {
    case DType::f16: return f16_to_float(f16_from_float(x));
    case DType::bf16: return bf16_to_float(bf16_from_float(x));
    default: return x;
  }
}

}  // namespace flash_attn::cli
