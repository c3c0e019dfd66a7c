// RMSNorm by itself, as layers use it: the sum with a residual before it, forward and backward.
#pragma once

#include "flash_attn/tensor.hpp"

namespace flash_attn::cpu {

/// h = x + residual, y = h / sqrt(mean of h^2 + eps) * weight. Memory of the CPU, in fp32, bf16 or fp16 each; columns
/// next to each other.
struct RmsNorm {
  Tensor x;           // (rows, cols)
  Tensor residual{};  // (rows, cols), optional
  Tensor weight;      // (cols)
  Tensor y;           // (rows, cols): written
  Tensor h{};         // (rows, cols), optional: written
  Tensor rstd;        // (rows, 1) fp32, dense: written
  double eps = 0.0;
  bool zero_centered_weight = false;  // weight + 1 counts
};

struct RmsNormBackward {
  Tensor dy;           // (rows, cols)
  Tensor dstream{};    // (rows, cols), optional: gradient of h
  Tensor h, rstd;      // of the forward; where it wrote no h, its x
  Tensor weight;       // (cols)
  Tensor dx;           // (rows, cols): written
  Tensor dresidual{};  // (rows, cols), optional: the same in another dtype
  Tensor dweight;      // (cols): written
  bool zero_centered_weight = false;
};

/// Computed in fp32, each result rounded once; the same bits for any number of threads. Both throw Error, with nothing
/// written, if shapes or dtypes do not fit.
void rms_norm(const RmsNorm& call);
void rms_norm_backward(const RmsNormBackward& call);

}  // namespace flash_attn::cpu
