#define FLASH_ATTN_ISA neon
#define FLASH_ATTN_ISA_NAME "neon"
#define FLASH_ATTN_WIDTH 4

#include "cpu/kernel/all.hpp"
