"""apply_rotary: the rotation, without a gradient. `flash_attn.layers.rotary` has the differentiable functions."""

from __future__ import annotations

import torch
from torch import Tensor

from flash_attn._refusal import refuse_gradient
from flash_attn.ops._rotary import applied

__all__ = ["apply_rotary"]


def apply_rotary(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    interleaved=False,
    inplace=False,
    conjugate=False,
) -> Tensor:
    """x (batch, seqlen, nheads, headdim), or (total, nheads, headdim) packed by cu_seqlens (batch + 1) int32, rotated.

    cos, sin (seqlen_rotary, rotary_dim / 2), in any floating dtype: row t is for position t. The first rotary_dim
    columns turn, as pairs (0, 1), (2, 3), ... if `interleaved`, else (0, rotary_dim / 2), (1, rotary_dim / 2 + 1), ...
    seqlen_offsets: the position of each sequence's first row: a number, or int32 or int64 (batch). inplace: x is
    written and returned. conjugate: the opposite direction. ValueError for shapes that do not fit and tables that are
    too short. On a device the offsets are not looked at: rows beyond the tables, and rows outside of cu_seqlens, do not
    turn. The result raises when it is differentiated.
    """
    with torch.no_grad():
        out = applied(x, cos, sin, seqlen_offsets, cu_seqlens, max_seqlen, interleaved, inplace, conjugate)
    if torch.is_grad_enabled():
        words = "apply_rotary has no gradient; flash_attn.layers.rotary.apply_rotary_emb has"
        return refuse_gradient(words, out, (x, cos, sin))
    return out
