// Apart from amx.cpp: what both passes use is then inlined into each, as if the other did not exist. Together, the
// forward of headdim 128 took a tenth longer.
#define FLASH_ATTN_ISA amx
#define FLASH_ATTN_WIDTH 16

#include "cpu/kernel/all_tiles.hpp"

namespace flash_attn::cpu::amx {

extern const BackwardKernel backward_bf16, backward_f16;
const BackwardKernel backward_bf16 = BackwardTiles<1>::kernel("bf16 tiles");
const BackwardKernel backward_f16 = BackwardTiles<2>::kernel("tiles of two bf16 parts");

}  // namespace flash_attn::cpu::amx
