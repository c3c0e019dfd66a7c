"""FlashAttention-3's functions, under the name of its package."""

from flash_attn._fa3.interface import *  # noqa: F403
from flash_attn._fa3.interface import __all__  # noqa: F401
