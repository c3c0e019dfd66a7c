// The kernels of src/cpu/isa/amx*.cpp over emulated tiles: the same source, for processors with AVX-512 and without
// AMX.
#define FLASH_ATTN_ISA emulated_tiles_isa
#define FLASH_ATTN_WIDTH 16
#define FLASH_ATTN_EMULATE_TILES

#include "cpu/kernel/all_tiles.hpp"

namespace flash_attn::test {

// Declared here and not in a shared header: no other inline code may be compiled for AVX-512.
extern const cpu::AttendKernel emulated_bf16, emulated_f16;
extern const cpu::BackwardKernel emulated_backward_bf16, emulated_backward_f16;
const cpu::AttendKernel emulated_bf16 = cpu::emulated_tiles_isa::Tiles<1>::kernel("emulated bf16 tiles");
const cpu::AttendKernel emulated_f16 = cpu::emulated_tiles_isa::Tiles<2>::kernel("emulated tiles of two bf16 parts");
const cpu::BackwardKernel emulated_backward_bf16 =
    cpu::emulated_tiles_isa::BackwardTiles<1>::kernel("emulated bf16 tiles");
const cpu::BackwardKernel emulated_backward_f16 =
    cpu::emulated_tiles_isa::BackwardTiles<2>::kernel("emulated tiles of two bf16 parts");

}  // namespace flash_attn::test
