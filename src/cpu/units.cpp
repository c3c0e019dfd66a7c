#include "cpu/units.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

#include "core/half.hpp"

namespace flash_attn::cpu {

float to_log2(double x) {
  constexpr double kMost = std::numeric_limits<float>::max();
  return static_cast<float>(std::isinf(x) ? x : std::clamp(x * kLog2e, -kMost, kMost));  // a NaN stays
}

ScoreScale score_scale(const ScorePipeline& s) {
  const double scale = std::abs(s.scale) * kLog2e;
  const float softcap_log2 = s.softcap > 0 ? std::max(to_log2(s.softcap), std::numeric_limits<float>::min()) : 0.0f;
  if (!(static_cast<float>(scale) > 0.0f)) return {0.0f, 1.0f, softcap_log2};
  const double factor = std::ldexp(1.0, std::max(0, std::ilogb(scale) - 64));
  return {static_cast<float>(std::copysign(factor, s.scale)), static_cast<float>(scale / factor), softcap_log2};
}

double load_number(const char* at, DType dtype) {
  switch (dtype) {
    case DType::f16: return f16_to_float(*reinterpret_cast<const uint16_t*>(at));
    case DType::bf16: return bf16_to_float(*reinterpret_cast<const uint16_t*>(at));
    case DType::f64: return *reinterpret_cast<const double*>(at);
    default: return *reinterpret_cast<const float*>(at);
  }
}

double sink_logit(const ScorePipeline& s, int64_t head) { return load_number(s.sink.at(0, 0, head), s.sink.dtype); }

}  // namespace flash_attn::cpu
