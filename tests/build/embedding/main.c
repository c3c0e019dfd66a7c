/* The C header in a strict program of C. */
#include <flash_attn/flash_attn.h>
#include <stdio.h>

int engine_check(void);

int main(void) {
  printf("FlashAttention-Plus %s\n", flash_attn_version());
  return engine_check();
}
