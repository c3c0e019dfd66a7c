#define FLASH_ATTN_ISA avx2
#define FLASH_ATTN_ISA_NAME "avx2"
#define FLASH_ATTN_WIDTH 8

#include "cpu/kernel/all.hpp"
