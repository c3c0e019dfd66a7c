// Rotary embedding by itself, as layers use it before attention: forward, and its gradient, which turns the other way.
#pragma once

#include "flash_attn/tensor.hpp"

namespace flash_attn::cpu {

/// Row r of a sequence whose first row stands at position p is turned by row p + r of the tables; where there is no
/// such row, and outside of cu_seqlens, it does not turn. Memory of the CPU; x in fp32, bf16 or fp16.
struct RotaryCall {
  Tensor x;                  // (batch, seqlen, [groups,] nheads, headdim); packed: (total, [groups,] nheads, headdim)
  Tensor out;                // as x, in other memory, or x itself
  Tensor cos, sin;           // (seqlen_rotary, rotary_dim / 2): fp32, bf16 or fp16
  Tensor cu_seqlens{};       // (batch + 1), int32 or int64: x is packed
  Tensor offsets{};          // (batch), int32 or int64: where the first rows stand
  int64_t offset = 0;        // without offsets
  bool interleaved = false;  // pairs are columns (2 i, 2 i + 1); else (i, i + rotary_dim / 2)
  bool conjugate = false;    // by the opposite angles
};

/// Computed in fp32, rounded once. Throws Error, with nothing written, if shapes or dtypes do not fit.
void rotate(const RotaryCall& call);

}  // namespace flash_attn::cpu
