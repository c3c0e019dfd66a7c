"""fp8 (e4m3) inputs, by conversion to bf16, in which every value of e4m3 is exact.

K and V are converted exactly. q_descale * k_descale goes into q, one rounding to bf16; v_descale into out, a second
rounding to bf16. With u = 2^-8 (the unit roundoff of bf16), s the largest softmax_scale |q_i| |k_j| (norms of
dequantised rows) and V the largest |v| (dequantised), a score errs by s u, and out differs from the exact attention of
the dequantised inputs by at most

    (exp(2 s u) - 1) V  +  3 u V

(probabilities, out, and out times v_descale are rounded to bf16). Without descales, or with powers of two, q is exact
too, and the first term goes away. lse errs by s u.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flash_attn._call import Sequences
from flash_attn._errors import InvalidArgument, InvalidType, NotServed
from flash_attn._s_dmask import sequence_of_rows

FP8 = torch.float8_e4m3fn


class Descales(NamedTuple):
    """Factors of the inputs, fp32 (batch, nheads_k)."""

    q: Tensor | None = None
    k: Tensor | None = None
    v: Tensor | None = None


def uses_fp8(q: Tensor, others: dict[str, Tensor | None], descales: Descales) -> bool:
    """Whether a call is one of fp8; refuses mixtures."""
    if q.dtype == FP8:
        for name, x in others.items():
            if isinstance(x, Tensor) and x.dtype != FP8:
                raise InvalidType(f"{name}: expected the dtype of q, {FP8}, got {x.dtype}")
        return True
    for name, x in others.items():
        if isinstance(x, Tensor) and x.dtype == FP8:
            raise InvalidType(f"{name}: expected the dtype of q, {q.dtype}, got {FP8}")
    for name, x in zip("qkv", descales, strict=False):
        if x is not None:
            raise InvalidArgument(f"{name}_descale: only for inputs of {FP8}, got {q.dtype}")
    return False


def check(q: Tensor, k: Tensor, qv, rotates: bool, descales: Descales, sequences: Sequences, needs_grad: bool):
    if needs_grad:
        raise NotServed(f"gradients of a call with inputs of {FP8} are not served")
    if qv is not None:
        raise NotServed(f"qv: not with inputs of {FP8}; convert them to bfloat16")
    if rotates:
        raise NotServed(f"rotary_cos, rotary_sin: not with inputs of {FP8}; rotate q and k before they are quantised")
    shape = (_batch(q, sequences), k.shape[-2] if k.dim() > 1 else 0)
    for name in "qkv":
        x = getattr(descales, name)
        if x is None:
            continue
        if not isinstance(x, Tensor) or x.dtype != torch.float32:
            kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise InvalidType(f"{name}_descale: expected a tensor of torch.float32, got {kind}")
        if tuple(x.shape) != shape:
            raise InvalidArgument(f"{name}_descale: expected shape (batch, nheads_k) = {shape}, got {tuple(x.shape)}")


def _batch(q: Tensor, sequences: Sequences) -> int:
    if sequences.cu_seqlens_q is not None:
        return max(sequences.cu_seqlens_q.numel() - 1, 0)
    return q.shape[0] if q.dim() else 0


def _times(x: Tensor, factor: Tensor | None, sequences: Sequences) -> Tensor:
    """x (..., nheads, columns) times factor (batch, nheads_k), in bf16."""
    if factor is None or x.dim() < 3 or 0 in (*factor.shape, *x.shape) or x.shape[-2] % factor.shape[1]:
        return x.to(torch.bfloat16)
    factor = factor.repeat_interleave(x.shape[-2] // factor.shape[1], 1)
    if sequences.cu_seqlens_q is None:
        factor = factor[:, None, :, None]
    else:
        _, b = sequence_of_rows(sequences.cu_seqlens_q, x.shape[0])
        factor = factor[b][..., None]
    return (x.float() * factor).to(torch.bfloat16)


def widened_q(q: Tensor, descales: Descales, sequences: Sequences) -> Tensor:
    of_q, of_k = descales.q, descales.k
    factor = of_q if of_k is None else of_k if of_q is None else of_q * of_k
    return _times(q, factor, sequences)


def descaled_out(out: Tensor, descales: Descales, sequences: Sequences) -> Tensor:
    return out if descales.v is None else _times(out, descales.v, sequences)


def widened_pages(k: Tensor, v: Tensor, sequences: Sequences) -> tuple[Tensor, Tensor, Sequences]:
    """The caches in bf16: of pages only those in the table, where that is fewer. For reading."""
    table = sequences.block_table
    well_formed = isinstance(table, Tensor) and table.dim() == 2 and table.dtype == torch.int32 and k.dim() == 4
    if well_formed and v.dim() == 4 and k.shape[0] == v.shape[0] and table.numel() < k.shape[0]:
        pool = k.shape[0]
        pages = table.flatten().clamp(0, pool - 1)  # beyond the used lengths a table may hold anything
        k, v = k.index_select(0, pages), v.index_select(0, pages)
        places = torch.arange(table.numel(), dtype=torch.int32, device=table.device).view_as(table)
        valid = (table >= 0) & (table < pool)  # what is not stays out of range: the core refuses it where it is used
        sequences = sequences._replace(block_table=torch.where(valid, places, table))
    return k.to(torch.bfloat16), v.to(torch.bfloat16), sequences
