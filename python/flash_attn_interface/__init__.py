"""FlashAttention-3's module by its name; the functions are flash_attn's, on every device."""

from flash_attn._fa3.interface import *  # noqa: F403
from flash_attn._fa3.interface import __all__  # noqa: F401
