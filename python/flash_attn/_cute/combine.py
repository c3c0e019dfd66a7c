"""The parts of a split attention, joined."""

from __future__ import annotations

import torch
from torch import Tensor

from flash_attn._call import check_tensors
from flash_attn._combine import combined
from flash_attn._errors import InvalidArgument
from flash_attn._s_dmask import sequence_of_rows


def flash_attn_combine(
    out_partial: Tensor,
    lse_partial: Tensor,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    cu_seqlens: Tensor | None = None,
    seqused: Tensor | None = None,
    virtual_batch_idx: Tensor | None = None,
    return_lse: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Attention over all keys from attention over parts of them: out = sum of exp(lse_s - lse) out_s.

    out_partial  (splits, batch, seqlen, nheads, headdim), or packed (splits, total, nheads, headdim): fp16, bf16, fp32
    lse_partial  (splits, batch, seqlen, nheads) or (splits, total, nheads), fp32; -inf: the part saw nothing
    out          written to, if given; else made, in out_dtype (None: that of out_partial)
    seqused      int32 (batch): rows beyond it become 0, with lse -inf; of packed rows with cu_seqlens (batch + 1)
    virtual_batch_idx  accepted: an order of work

    Sums are in fp32. -> out, lse (of the shape of one part's; None without return_lse). Gradients are autograd's,
    unless `out` is given.
    """
    check_tensors(out_partial=out_partial, lse_partial=lse_partial)
    if out_partial.dim() not in (4, 5):
        raise InvalidArgument(
            "out_partial: expected (splits, batch, seqlen, nheads, headdim) or (splits, total, nheads, headdim), got "
            f"{tuple(out_partial.shape)}"
        )
    if lse_partial.shape != out_partial.shape[:-1]:
        raise InvalidArgument(f"lse_partial: expected {tuple(out_partial.shape[:-1])}, got {tuple(lse_partial.shape)}")
    if out is not None and out.shape != out_partial.shape[1:]:
        raise InvalidArgument(f"out: expected {tuple(out_partial.shape[1:])}, got {tuple(out.shape)}")
    parts = out_partial.to(torch.promote_types(out_partial.dtype, torch.float32))
    lse_partial = lse_partial.to(parts.dtype)
    if seqused is not None:
        rows = torch.arange(parts.shape[-3], device=parts.device)
        if parts.dim() == 5:
            used = rows < seqused[:, None]
        elif cu_seqlens is None:
            raise InvalidArgument("cu_seqlens: required with seqused where rows are packed, got None")
        else:
            rows, b = sequence_of_rows(cu_seqlens, parts.shape[1])
            used = rows - cu_seqlens[b] < seqused[b]
        lse_partial = lse_partial.masked_fill(~used[..., None], -torch.inf)
    result, lse = combined(parts, lse_partial)
    result = result.to(out.dtype if out is not None else out_dtype or out_partial.dtype)
    result = result if out is None else out.copy_(result)
    return result, lse.float() if return_lse else None
