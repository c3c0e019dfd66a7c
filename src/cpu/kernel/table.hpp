// The kernels of one instruction set, as the drivers see them.

namespace flash_attn::cpu::FLASH_ATTN_ISA {

extern const Kernels kernels;
const Kernels kernels = {
    .name = FLASH_ATTN_ISA_NAME,
    .width = W,
    .panel = kPanel,
    .attend_f32 = &kAttendFp32,
    .attend_bf16 = &kAttendFp32,
    .attend_f16 = &kAttendFp32,
    .attend_any = &kAttendFp32,
    .backward_group = kBackwardGroup,
    .backward_block = kBackwardBlock,
    .backward_scratch = 2 * kBackwardGroup * (kBackwardBlock + W),
    .pack_panel = pack_panel,
    .pack_strips = pack_strips,
    .load_rows = load_rows,
    .store_rows = store_rows,
    .dot_rows = dot_rows,
    .merge_rows = merge_rows,
    .finish_rows = finish_rows,
    .backward = backward,
};

}  // namespace flash_attn::cpu::FLASH_ATTN_ISA
