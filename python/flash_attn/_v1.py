"""Version 1's functions of packed sequences, whose names became flash_attn_varlen_* in version 2."""

from __future__ import annotations

import torch
from torch import Tensor

from flash_attn._errors import NotServed
from flash_attn.flash_attn_interface import (
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)


def _padded(lse: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """(nheads, total) -> (batch, nheads, max_seqlen), as version 1 has it; +inf beyond a sequence's end."""
    rows = cu_seqlens[:-1, None] + torch.arange(max_seqlen, device=lse.device)
    beyond = rows >= cu_seqlens[1:, None]
    if not lse.shape[1]:
        return lse.new_full((rows.shape[0], lse.shape[0], max_seqlen), torch.inf)
    return lse[:, rows.clamp(max=lse.shape[1] - 1)].transpose(0, 1).masked_fill(beyond[:, None], torch.inf)


def _check_causal(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int) -> None:
    if max_seqlen_q != max_seqlen_k or (cu_seqlens_q.device.type == "cpu" and not cu_seqlens_q.equal(cu_seqlens_k)):
        raise NotServed(
            "causal: version 1's mask aligns top-left, where there are more keys than queries or fewer; "
            "use flash_attn_varlen_func, whose mask aligns bottom-right"
        )


def _call(function, inputs, cu_seqlens_q, max_seqlen_q, dropout_p, softmax_scale, causal, probs, deterministic):
    result = function(
        *inputs,
        dropout_p=dropout_p,
        softmax_scale=softmax_scale,
        causal=causal,
        deterministic=deterministic,
        return_attn_probs=probs,
    )
    if not probs:
        return result
    out, lse, S_dmask = result
    return out, _padded(lse, cu_seqlens_q, max_seqlen_q), S_dmask


def flash_attn_unpadded_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p,
    softmax_scale=None,
    causal=False,
    return_attn_probs=False,
    deterministic=False,
):
    """flash_attn_varlen_func with version 1's arguments; softmax_lse is (batch, nheads, max_seqlen_q). causal: needs
    queries and keys of the same lengths (which is looked at on a CPU; elsewhere only the longest lengths are)."""
    if causal:
        _check_causal(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    inputs = q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    return _call(flash_attn_varlen_func, inputs, cu_seqlens_q, max_seqlen_q, dropout_p, softmax_scale, causal,
                 return_attn_probs, deterministic)  # fmt: skip


def flash_attn_unpadded_kvpacked_func(
    q,
    kv,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p,
    softmax_scale=None,
    causal=False,
    return_attn_probs=False,
    deterministic=False,
):
    """flash_attn_unpadded_func of kv (total_k, 2, nheads_k, headdim)."""
    if causal:
        _check_causal(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    inputs = q, kv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    return _call(flash_attn_varlen_kvpacked_func, inputs, cu_seqlens_q, max_seqlen_q, dropout_p, softmax_scale, causal,
                 return_attn_probs, deterministic)  # fmt: skip


def flash_attn_unpadded_qkvpacked_func(
    qkv,
    cu_seqlens,
    max_seqlen,
    dropout_p,
    softmax_scale=None,
    causal=False,
    return_attn_probs=False,
    deterministic=False,
):
    """flash_attn_unpadded_func of qkv (total, 3, nheads, headdim)."""
    inputs = qkv, cu_seqlens, max_seqlen
    return _call(flash_attn_varlen_qkvpacked_func, inputs, cu_seqlens, max_seqlen, dropout_p, softmax_scale, causal,
                 return_attn_probs, deterministic)  # fmt: skip


def flash_attn_unpadded_qkvpacked_split_func(
    qkv,
    cu_seqlens,
    max_seqlen0,
    max_seqlen1,
    batch_size0,
    dropout_p,
    softmax_scale=None,
    causal=False,
    return_attn_probs=False,
    deterministic=False,
):
    """flash_attn_unpadded_qkvpacked_func: the first batch_size0 sequences are at most max_seqlen0 long, the others
    max_seqlen1. One call; there is nothing to gain from two."""
    return flash_attn_unpadded_qkvpacked_func(
        qkv, cu_seqlens, max(max_seqlen0, max_seqlen1), dropout_p, softmax_scale, causal, return_attn_probs,
        deterministic,
    )  # fmt: skip
