"""S_dmask: the probabilities of a call with dropout, negative where they were dropped. For looking at, and for tests.

It takes seqlen_q * seqlen_k memory, and no kernel of its own: attention over one-hot values is its own matrix of
probabilities. One call without dropout gives P, one with equal scores tells what is kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flash_attn import _run
from flash_attn._call import Dropout, Run, Scores, Sequences
from flash_attn._errors import InvalidArgument, NotServed

_EQUAL_SCORES = Scores(softmax_scale=1.0)


def round_multiple(x: int, m: int) -> int:
    return (x + m - 1) // m * m


def sequence_of_rows(cu_seqlens: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """-> the rows [0, total) of packed sequences, and the sequence of each; the last one's for rows of none."""
    rows = torch.arange(total, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    last = max(cu_seqlens.numel() - 2, 0)
    return rows, torch.searchsorted(cu_seqlens[1:], rows, right=True).clamp_(max=last)


def empty_s_dmask(q: Tensor, sequences: int, nheads: int, seqlen_q: int, seqlen_k: int) -> Tensor:
    """(batch, nheads, seqlen_q, seqlen_k), both lengths rounded up to 128; of packed sequences the longest."""
    return q.new_empty((sequences, nheads, round_multiple(seqlen_q, 128), round_multiple(seqlen_k, 128)))


def _one_hot_values(k: Tensor, cu_seqlens_k: Tensor | None, leftpad_k: Tensor | None, seqlen_k: int) -> Tensor:
    """(..., nheads_k, seqlen_k): key j of its sequence has a one in column j."""
    if cu_seqlens_k is None:
        column = torch.arange(seqlen_k, device=k.device).expand(k.shape[:2])
    else:
        rows, b = sequence_of_rows(cu_seqlens_k, k.shape[0])
        first = cu_seqlens_k[:-1] if leftpad_k is None else cu_seqlens_k[:-1] + leftpad_k
        column = (rows - first[b]).clamp_(0, seqlen_k - 1).long()  # rows of no sequence are not read
    one_hot = torch.nn.functional.one_hot(column, seqlen_k).to(k.dtype)
    return one_hot.unsqueeze(-2).expand(*k.shape[:-1], seqlen_k)


def s_dmask(q: Tensor, k: Tensor, sequences: Sequences, scores: Scores, dropout: Dropout, run: Run) -> Tensor:
    """+-exp(score - the row's largest) in the dtype of q, negative where dropped; 0 where a row does not see."""
    if sequences.block_table is not None:
        raise NotServed("return_attn_probs: S_dmask is not available with block_table")
    packed = sequences.cu_seqlens_q is not None
    if packed and (sequences.max_seqlen_q is None or sequences.max_seqlen_k is None):
        raise InvalidArgument("max_seqlen_q, max_seqlen_k: required where S_dmask is asked for")
    seqlen_q, seqlen_k = (sequences.max_seqlen_q, sequences.max_seqlen_k) if packed else (q.shape[1], k.shape[1])
    batch = sequences.cu_seqlens_q.numel() - 1 if packed else q.shape[0]
    result = empty_s_dmask(q, batch, q.shape[-2], seqlen_q, seqlen_k).zero_()
    if result.numel() == 0:
        return result

    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    q, k = q.to(wide), k.to(wide)
    v = _one_hot_values(k, sequences.cu_seqlens_k, sequences.leftpad_k, seqlen_k)

    def attend(q, k, scores, dropout):
        out = q.new_empty((*q.shape[:-1], seqlen_k))
        _run.forward(q, k, v, out, None, sequences, scores, dropout, run)
        return out

    p = attend(q, k, scores, None)
    kept = attend(torch.zeros_like(q), torch.zeros_like(k), _EQUAL_SCORES, dropout) > 0
    p /= p.amax(-1, keepdim=True).clamp_min(torch.finfo(wide).tiny)
    signed = torch.where(kept, p, -p).transpose(-3, -2)  # (..., nheads, rows, seqlen_k)
    if not packed:
        result[:, :, :seqlen_q, :seqlen_k] = signed
        return result
    starts = sequences.cu_seqlens_q.tolist()
    for b, (first, end) in enumerate(zip(starts[:-1], starts[1:], strict=True)):
        result[b, :, : end - first, :seqlen_k] = signed[:, first:end]
    return result
