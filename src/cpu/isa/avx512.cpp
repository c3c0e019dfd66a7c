#define FLASH_ATTN_ISA avx512
#define FLASH_ATTN_ISA_NAME "avx512"
#define FLASH_ATTN_WIDTH 16

#include "cpu/kernel/all.hpp"
