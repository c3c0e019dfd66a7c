"""Upstream's compiled module: importing it defines torch.ops.flash_attn_3."""

from flash_attn._fa3 import operators  # noqa: F401
