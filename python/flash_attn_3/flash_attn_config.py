"""flash_attn_config, under the name of its package."""

from flash_attn_config import CONFIG

__all__ = ["CONFIG"]
