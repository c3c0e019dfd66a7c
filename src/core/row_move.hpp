// One row of all heads on its way to another place, or to its own: copied, or turned by the angles of its position
// (rotary embedding; Su et al. 2021, eq. 34).
//
// Plain structs, for kernels of every instruction set: no code here is shared among them.
#pragma once

#include <cstdint>

#include "flash_attn/tensor.hpp"

namespace flash_attn {

/// A pair (a, b) of columns becomes (a cos - b sin, a sin + b cos).
struct RowAngles {
  const char *cos = nullptr, *sin = nullptr;  // (pairs): of one position
  DType cos_dtype = DType::f32, sin_dtype = DType::f32;
  int64_t cos_stride = 1, sin_stride = 1;  // in elements
  int64_t pairs = 0;                       // 0: nothing turns
  bool interleaved = false;                // pairs are columns (2 i, 2 i + 1); else (i, i + pairs)
  bool conjugate = false;                  // the other way: the inverse, and the gradient
};

/// Columns from 2 * pairs on are copied.
struct RowMove {
  DType dtype;
  int64_t heads, cols;
  const char* from;             // head 0, column 0
  char* into;                   // `from` itself: in place. No other overlap
  int64_t from_head, from_col;  // strides in elements
  int64_t into_head, into_col;
  RowAngles angles;
};

using MoveRow = void (*)(const RowMove&);

/// In plain loops: any floating dtype and strides. Computed in fp32 (fp64 in fp64), rounded once.
void move_row(const RowMove& move);

}  // namespace flash_attn
