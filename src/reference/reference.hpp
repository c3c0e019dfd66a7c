// The oracle: attention as its formula says it, in double, one row after the other.
//
// Memory beyond the operands is linear in the sequence lengths (the gradient of a bias: in the bias's own size).
#pragma once

#include "core/problem.hpp"

namespace flash_attn::reference {

void forward(const Problem& problem);
void backward(const Problem& problem);

}  // namespace flash_attn::reference
