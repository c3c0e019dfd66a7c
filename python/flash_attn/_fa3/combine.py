"""FlashAttention-3's flash_attn_combine."""

from __future__ import annotations

import torch

from flash_attn._call import check_tensors
from flash_attn._combine import combined
from flash_attn._errors import InvalidArgument, InvalidType


def flash_attn_combine(out_partial, lse_partial, out=None, out_dtype=None):
    """Puts results of attention over several parts of the keys together.

    out_partial   (splits, batch, seqlen, nheads, headdim_v) or (splits, total, nheads, headdim_v), fp32 (or fp64)
    lse_partial   (splits, batch, seqlen, nheads) or (splits, total, nheads), natural logarithm: heads last
    out           memory for the result; out_dtype: its dtype, by default out's, else out_partial's

    -> out (batch, seqlen, nheads, headdim_v) and lse (batch, seqlen, nheads), fp32. A part whose lse is -inf or +inf
    saw no key, and its out is not looked at. Where no part saw any, out is 0 and lse -inf. Differentiable.
    """
    check_tensors(out_partial=out_partial, lse_partial=lse_partial)
    for name, x in (("out_partial", out_partial), ("lse_partial", lse_partial)):
        if x.dtype not in (torch.float32, torch.float64):
            raise InvalidType(f"{name}: expected torch.float32 (or float64), got {x.dtype}")
    if out_partial.dim() not in (4, 5):
        raise InvalidArgument(
            "out_partial: expected shape (splits, batch, seqlen, nheads, headdim_v) or (splits, total, nheads, "
            f"headdim_v), got {tuple(out_partial.shape)}"
        )
    if lse_partial.shape != out_partial.shape[:-1]:
        shape = tuple(out_partial.shape[:-1])
        raise InvalidArgument(f"lse_partial: expected shape {shape}, got {tuple(lse_partial.shape)}")
    if out_partial.shape[0] < 1:
        raise InvalidArgument("out_partial: expected at least one part")
    if out is not None:
        check_tensors(out=out)
        if out.shape != out_partial.shape[1:]:
            raise InvalidArgument(f"out: expected shape {tuple(out_partial.shape[1:])}, got {tuple(out.shape)}")
        if out_dtype is not None and out_dtype != out.dtype:
            raise InvalidType(f"out_dtype: expected the dtype of out, {out.dtype}, got {out_dtype}")

    result, lse = combined(out_partial, lse_partial)
    if out is None:
        return result.to(out_dtype or out_partial.dtype), lse.float()
    return out.copy_(result), lse.float()
