// The kernels of one instruction set, as the drivers see them.

namespace flash_attn::cpu::FLASH_ATTN_ISA {

extern const Kernels kernels;
const Kernels kernels = {
    .name = FLASH_ATTN_ISA_NAME,
    .width = W,
    .panel = kPanel,
    .group = kGroup,
    .block = kBlock,
    .attend_scratch = kGroup * (kBlock + W) + kGroup,
    .pack_panel = pack_panel,
    .pack_strips = pack_strips,
    .load_rows = load_rows,
    .store_rows = store_rows,
    .attend = attend,
};

}  // namespace flash_attn::cpu::FLASH_ATTN_ISA
