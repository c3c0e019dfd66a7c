"""FlashAttention-3's package by its name: flash_attn_3.flash_attn_interface, flash_attn_3._C."""
