"""Attention under a RowMask: which function of flash_attn serves it, and how it is told.

No way below writes a mask of seqlen_q x seqlen_k elements, but _dense.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from flash_attn.bert_padding import _starts, index_first_axis, pad_input
from flash_attn.integrations._row_mask import RowMask


def attend(q: Tensor, k: Tensor, v: Tensor, mask: RowMask, scores: dict, bias: Tensor | None = None) -> Tensor:
    """q (batch, seqlen_q, nheads, headdim), k, v (batch, seqlen_k, nheads_k, ...) -> (batch, seqlen_q, nheads, ...).

    scores: dropout_p, softmax_scale, softcap, learnable_sink, deterministic; bias as attn_bias.
    Queries that are padding themselves give 0 where the mask is causal.
    """
    if mask.sequence is not None:
        return _packed(q, k, v, mask, scores, bias)
    inputs = (q, k, v, scores["learnable_sink"])
    needs_grad = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    reads_only = not needs_grad and scores["dropout_p"] == 0.0
    # flash_attn puts the last query at the last key: before padding there is no such place. And a window that looks
    # ahead lets queries that are padding see keys, so they cannot be dropped.
    ahead = mask.bounded and mask.right != 0
    kept = mask.padding == "none" or (mask.padding == "left" and reads_only)
    if bias is not None or mask.padding == "holes" or (ahead and not (kept and mask.aligned)):
        return _with_bias(q, k, v, mask, scores, bias)
    window = dict(causal=mask.right == 0, window_size=(mask.left, mask.right))
    if mask.padding == "none" and (mask.aligned or not mask.bounded):
        return flash_attn_func(q, k, v, **window, **scores)
    if reads_only and not (mask.bounded and mask.padding == "ends"):
        return _from_cache(q, k, v, mask, window, scores)
    if mask.padding == "none":
        keys = int(mask.shift) + q.shape[1]
        return flash_attn_func(q, k[:, :keys], v[:, :keys], **window, **scores)
    return _unpadded(q, k, v, mask, window, scores)


def _from_cache(q, k, v, mask: RowMask, window: dict, scores: dict) -> Tensor:
    """The used rows of a longer cache, without padding on the left: nothing is copied."""
    if mask.bounded or mask.stop is None:
        length = (mask.shift + q.shape[1]).to(q.device, torch.int32).expand(q.shape[0])
    else:
        length = mask.stop
    scores = {name: value for name, value in scores.items() if name not in ("dropout_p", "deterministic")}
    length = length.contiguous()
    return flash_attn_with_kvcache(q, k, v, cache_seqlens=length, cache_leftpad=mask.first, **window, **scores)


def _packing(mask: RowMask) -> tuple:
    """-> (rows of queries or None if all, cu_seqlens_q, max_seqlen_q), the same of keys. Once per mask, not layer."""
    if (packing := getattr(mask, "_packing", None)) is None:
        batch, _, seqlen_q, seqlen_k = mask.shape
        keys = mask.key_mask()
        lengths = mask.stop - mask.first
        of_keys = (keys.flatten().nonzero().flatten(), _starts(lengths), max(int(lengths.max()), 1))
        if mask.bounded:
            p = torch.arange(seqlen_q, device=mask.device) + mask.shift
            queries = (p >= mask.first[:, None]) & (p < mask.stop[:, None])
            lengths = queries.sum(-1, dtype=torch.int32)
            of_queries = (queries.flatten().nonzero().flatten(), _starts(lengths), max(int(lengths.max()), 1))
        else:  # where queries stand does not matter, nor whether they are tokens of the keys' sequence
            starts = torch.arange(batch + 1, dtype=torch.int32, device=mask.device) * seqlen_q
            of_queries = (None, starts, seqlen_q)
        packing = mask._packing = of_queries, of_keys
    return packing


def _unpadded(q, k, v, mask: RowMask, window: dict, scores: dict) -> Tensor:
    (rows_q, cu_seqlens_q, max_q), (rows_k, cu_seqlens_k, max_k) = _packing(mask)
    batch, seqlen_q = q.shape[:2]
    k, v = (index_first_axis(x.flatten(0, 1), rows_k) for x in (k, v))
    q = q.flatten(0, 1)
    if rows_q is not None:
        q = index_first_axis(q, rows_q)
    out = flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, **window, **scores)
    return out.unflatten(0, (batch, seqlen_q)) if rows_q is None else pad_input(out, rows_q, batch, seqlen_q)


def _packed(q, k, v, mask: RowMask, scores: dict, bias: Tensor | None) -> Tensor:
    """Several sequences in each row of the batch."""
    if bias is not None or mask.padding != "none":
        return _dense(q, k, v, mask, scores, bias)
    if (starts := getattr(mask, "_packing", None)) is None:
        batch, seqlen = mask.sequence.shape
        new = torch.ones((batch, seqlen), dtype=torch.bool, device=q.device)
        new[:, 1:] = mask.sequence.diff(dim=-1) != 0
        starts = torch.nn.functional.pad(new.flatten().nonzero().flatten(), (0, 1), value=batch * seqlen).int()
        starts = mask._packing = starts, int(starts.diff().max())
    return attend_packed(q, k, v, starts, starts, mask.left, mask.right, scores)


def attend_packed(q, k, v, starts_q: tuple, starts_k: tuple, left: int, right: int, scores: dict) -> Tensor:
    """starts: (cu_seqlens (n + 1) int32, the longest sequence), over the rows of the flattened batch."""
    batch, seqlen_q = q.shape[:2]
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    (cu_seqlens_q, max_q), (cu_seqlens_k, max_k) = starts_q, starts_k
    out = flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, causal=right == 0, window_size=(left, right), **scores
    )
    return out.unflatten(0, (batch, seqlen_q))


def as_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """bool, True where a key is seen -> 0 and -inf."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)


def _with_bias(q, k, v, mask: RowMask, scores: dict, bias: Tensor | None) -> Tensor:
    """Padding as a bias of keys, (batch, 1, 1, seqlen_k)."""
    seqlen_q, seqlen_k = mask.shape[2:]
    if mask.bounded and not mask.aligned:
        if mask.right != 0:
            return _dense(q, k, v, mask, scores, bias)
        seqlen_k = min(int(mask.shift) + seqlen_q, seqlen_k)
    if (keys := mask.key_mask()) is not None:
        padding = as_bias(keys, q.dtype)[:, None, None, :]
        bias = padding if bias is None else bias + padding
    bias = None if bias is None else bias[..., :seqlen_k]
    window = dict(causal=mask.right == 0, window_size=(mask.left, mask.right))
    return flash_attn_func(q, k[:, :seqlen_k], v[:, :seqlen_k], attn_bias=bias, **window, **scores)


def _dense(q, k, v, mask: RowMask, scores: dict, bias: Tensor | None) -> Tensor:
    dense = as_bias(mask.dense(), q.dtype)
    return flash_attn_func(q, k, v, attn_bias=dense if bias is None else bias + dense, **scores)
