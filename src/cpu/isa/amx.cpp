#define FLASH_ATTN_ISA amx
#define FLASH_ATTN_WIDTH 16

#include "cpu/kernel/all_tiles.hpp"

namespace flash_attn::cpu::amx {

extern const AttendKernel attend_bf16, attend_f16;
const AttendKernel attend_bf16 = Tiles<1>::kernel("bf16 tiles");
const AttendKernel attend_f16 = Tiles<2>::kernel("tiles of two bf16 parts");

}  // namespace flash_attn::cpu::amx
