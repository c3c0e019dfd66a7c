// RMSNorm (Zhang and Sennrich 2019) of some rows, as kernels see it. Plain structs: no code here is shared among
// instruction sets.
//
//   h = x + residual        rstd = 1 / sqrt(mean of h^2 + eps)        y = h rstd weight
//   dweight = sum over rows of dy h rstd
//   dh = rstd (dy weight - h rstd^2 (sum over columns of dy h weight) / cols) + dstream
#pragma once

#include <cstdint>

#include "flash_attn/tensor.hpp"

namespace flash_attn::cpu {

/// Rows of fp32, bf16 or fp16, columns next to each other.
struct Rows {
  char* data = nullptr;  // nullptr: absent
  DType dtype = DType::f32;
  int64_t stride = 0;  // in elements
};

struct NormRows {
  int64_t rows, cols;
  Rows x, residual;     // residual: optional
  const float* weight;  // (cols padded to the width)
  float eps;
  Rows y, h;    // written; h: optional, and y is of h before it is rounded
  float* rstd;  // (rows): written
};

struct NormGradientRows {
  int64_t rows, cols;
  Rows dy, dstream, h;  // dstream: optional
  const float *weight, *rstd;
  Rows dh[2];      // written; the second: optional, the same in another dtype
  float* dweight;  // (cols padded to the width): added to, row by row
};

}  // namespace flash_attn::cpu
