#define FLASH_ATTN_ISA baseline
#define FLASH_ATTN_ISA_NAME "baseline"
#define FLASH_ATTN_WIDTH 4

#include "cpu/kernel/all.hpp"
