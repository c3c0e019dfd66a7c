#define FLASH_ATTN_ISA amx
#define FLASH_ATTN_WIDTH 16

#include "cpu/kernels.hpp"

#include "cpu/simd.hpp"

#include "cpu/kernel/tile.hpp"

#include "cpu/kernel/pack.hpp"
#include "cpu/kernel/scores.hpp"
#include "cpu/kernel/softmax.hpp"

#include "cpu/kernel/dropout.hpp"

#include "cpu/kernel/tiles.hpp"

#include "cpu/kernel/attend_tiles.hpp"
#include "cpu/kernel/gradients.hpp"

#include "cpu/kernel/backward_tiles.hpp"

namespace flash_attn::cpu::amx {

extern const AttendKernel attend_bf16, attend_f16;
extern const BackwardKernel backward_bf16, backward_f16;
const AttendKernel attend_bf16 = Tiles<1>::kernel("bf16 tiles");
const AttendKernel attend_f16 = Tiles<2>::kernel("tiles of two bf16 parts");
const BackwardKernel backward_bf16 = BackwardTiles<1>::kernel("bf16 tiles");
const BackwardKernel backward_f16 = BackwardTiles<2>::kernel("tiles of two bf16 parts");

}  // namespace flash_attn::cpu::amx
