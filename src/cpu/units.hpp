// The score pipeline in the units of the kernels: scores in base 2, numbers in fp32.
//
// s log2(e) leaves fp32 for |s| above 2.36e38 = FLT_MAX / log2(e). What is finite is kept finite here: an infinite
// slope, say, would make NaN of a distance of 0.
#pragma once

#include <cstdint>

#include "core/problem.hpp"
#include "cpu/kernels.hpp"

namespace flash_attn::cpu {

/// x log2(e) in fp32. An infinite x stays what it is, a finite one stays finite.
float to_log2(double x);

/// How a kernel gets scores from the products x = (q_factor q) . k:
///   s = scale x, or softcap_log2 tanh(scale x / softcap_log2), in base 2.
/// The scale is positive, so that maxima of x are maxima of s and -inf stays what it is. q_factor has the sign, which
/// rounds nothing. Of a scale above 2^64 it takes a power of two, so that products whose scores are of any size are no
/// denormals (tiles take those for 0), and because fp32 cannot hold 3e38 in base 2: there it is 2^64.
struct ScoreScale {
  float q_factor, scale;
  float softcap_log2;  // 0: off; else normal: a softcap of 1e-44 becomes 1.2e-38, under which all scores are 0 as well
};
ScoreScale score_scale(const ScorePipeline& scores);

/// A number in memory, of f16, bf16, f32 or f64.
double load_number(const char* at, DType dtype);

/// The sink of a head as a logit (natural log units).
double sink_logit(const ScorePipeline& scores, int64_t head);

}  // namespace flash_attn::cpu
