// The kernels of one instruction set, as the drivers see them.

namespace flash_attn::cpu::FLASH_ATTN_ISA {

extern const Kernels kernels;
const Kernels kernels = {
    .name = FLASH_ATTN_ISA_NAME,
    .width = W,
    .attend_f32 = &kAttendFp32,
    .attend_bf16 = &kAttendFp32,
    .attend_f16 = &kAttendFp32,
    .attend_any = &kAttendFp32,
    .attend_in_place = &kAttendInPlace,
    .backward_f32 = &kBackwardFp32,
    .backward_bf16 = &kBackwardFp32,
    .backward_f16 = &kBackwardFp32,
    .backward_any = &kBackwardFp32,
    .store_rows = store_rows,
    .dot_rows = dot_rows,
    .merge_rows = merge_rows,
    .finish_rows = finish_rows,
    .move_row = move_row,
    .norm_rows = norm_rows,
    .norm_gradient_rows = norm_gradient_rows,
    .read_row = read_row,
    .sum_parts = sum_parts,
};

}  // namespace flash_attn::cpu::FLASH_ATTN_ISA
