"""attention of torch tensors: the ordinary path, with autograd."""

from __future__ import annotations

import torch

from flash_attn import _attention
from flash_attn._backend import current
from flash_attn._call import FIXED, NO_DROPOUT, Run, check_tensors
from flash_attn._errors import InvalidArgument, NotServed
from flash_attn._tensors import is_plain


def attention(q, k, v, sequences, scores, return_lse, out):
    check_tensors(q=q, k=k, v=v)
    if not is_plain(q, k, v):
        if sequences.cu_seqlens_q is None and sequences is not FIXED:
            raise NotServed(
                "seqused_q, seqused_k, block_table: traced calls take cu_seqlens; or flash_attn_with_kvcache"
            )
        if out is not None:
            raise NotServed("out: traced calls have no memory to write; leave it out")
        return _recorded(q, k, v, sequences, scores, return_lse)
    if torch.is_grad_enabled() and _attention._needs_grad((q, k, v), scores):
        if out is not None:
            raise InvalidArgument("out: memory that is given has no gradient; leave it out, or use torch.no_grad()")
        return _recorded(q, k, v, sequences, scores, return_lse)
    run = Run(current(), None, False, False, False)
    out, lse, *_ = _attention.forward(q, k, v, sequences, scores, 0.0, run, return_lse, False, out=out)
    return (out, lse) if return_lse else out


def _recorded(q, k, v, sequences, scores, return_lse):
    """By autograd, or in a graph."""
    result = _attention.attention((q, k, v), sequences, scores, 0.0, False, return_lse, "attention")
    if not return_lse:
        return result
    out, lse, _ = result
    return out, torch.where(lse == torch.inf, -torch.inf, lse)  # FlashAttention-2's sign of a row without keys


def attention_backward(dout, q, k, v, out, lse, dlse, sequences, scores, wants_dbias):
    """-> dq, dk, dv, dbias or None, dsink or None. Records no gradient itself."""
    check_tensors(dout=dout, q=q, k=k, v=v, out=out, softmax_lse=lse)
    if not is_plain(dout, q, k, v):
        raise NotServed("attention_backward: not traced; differentiate attention")
    wants_dsink = scores.learnable_sink is not None
    run = Run(current(), None, False, False, False)
    with torch.no_grad():
        results = _attention.gradients(
            dout, q, k, v, out, lse, dlse, 0, sequences, scores, NO_DROPOUT, run, wants_dsink, wants_dbias
        )
    dq, dk, dv, *extras = results
    dsink = extras.pop(0) if wants_dsink else None
    return dq, dk, dv, extras.pop(0) if wants_dbias else None, dsink
