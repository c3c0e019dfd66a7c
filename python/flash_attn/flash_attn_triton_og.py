"""`attention` of upstream's flash_attn_triton_og, which benchmarks compare with: causal, heads before positions."""

from __future__ import annotations

from flash_attn.flash_attn_triton import flash_attn_func

__all__ = ["attention"]


def attention(q, k, v, sm_scale):
    """q, k, v (batch, nheads, seqlen, headdim) -> the same shape; query i sees the keys j <= i."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return flash_attn_func(q, k, v, None, True, sm_scale).transpose(1, 2)
