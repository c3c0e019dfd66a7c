"""FlashAttention-4's calling surface, on whatever hardware there is. See docs/flash-attention-4.md."""

from flash_attn import __plus_version__ as __version__
from flash_attn.cute.interface import flash_attn_func, flash_attn_varlen_func

__all__ = ["__version__", "flash_attn_func", "flash_attn_varlen_func"]
