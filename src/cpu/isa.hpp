// The instruction sets compiled in, and the one in use.
#pragma once

#include <string>
#include <vector>

#include "cpu/kernels.hpp"

namespace flash_attn::cpu {

/// Chosen once: the best that this processor runs, or what FLASH_ATTENTION_CPU_ISA names.
/// Throws invalid_argument if that name is unknown or cannot run here.
const Kernels& active_kernels();
/// All that can run here, best first.
std::vector<const Kernels*> usable_kernels();

}  // namespace flash_attn::cpu
