"""The name under which others import upstream's compiled module; the functions are flash_attn's, on every device."""

from flash_attn._flash_attn_gpu import bwd, fwd, fwd_kvcache, varlen_bwd, varlen_fwd

__all__ = ["bwd", "fwd", "fwd_kvcache", "varlen_bwd", "varlen_fwd"]
