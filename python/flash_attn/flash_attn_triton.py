"""The functions of upstream's flash_attn_triton: attention with an additive bias. On any device, by any backend.

Beyond upstream: the bias has a gradient, any dtype and headdim, fewer heads of keys. As there, and unlike
flash_attn_func, causal aligns top-left: query i sees the keys up to i, whatever their number.
"""

from __future__ import annotations

import types

import torch
from torch import Tensor

from flash_attn import _run
from flash_attn._attention import forward
from flash_attn._call import FIXED, NO_DROPOUT, Run, Scores
from flash_attn._errors import InvalidArgument
from flash_attn._s_dmask import round_multiple
from flash_attn.flash_attn_interface import flash_attn_func as _attention

__all__ = [
    "FlashAttnFunc",
    "FlashAttnKVPackedFunc",
    "FlashAttnQKVPackedFunc",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
]


def _top_left(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool):
    """-> k, v and bias without the keys that no query sees, and the window that says the rest, aligned bottom-right."""
    if not causal:
        return k, v, bias, (-1, -1)
    seqlen_q = q.shape[1]
    if k.shape[1] > seqlen_q:
        k, v = k[:, :seqlen_q], v[:, :seqlen_q]
        bias = None if bias is None else bias[..., :seqlen_q]
    return k, v, bias, (-1, seqlen_q - k.shape[1])


def flash_attn_func(q, k, v, bias=None, causal=False, softmax_scale=None):
    """softmax(softmax_scale * q k' + bias) v -> (batch, seqlen_q, nheads, headdim).

    q (batch, seqlen_q, nheads, headdim), k and v (batch, seqlen_k, nheads_k, headdim), bias (batch | 1, nheads | 1,
    seqlen_q | 1, seqlen_k). causal: query i sees the keys j <= i.
    """
    k, v, bias, window_size = _top_left(q, k, v, bias, causal)
    return _attention(q, k, v, softmax_scale=softmax_scale, window_size=window_size, attn_bias=bias)


def flash_attn_kvpacked_func(q, kv, bias=None, causal=False, softmax_scale=None):
    """flash_attn_func of kv (batch, seqlen_k, 2, nheads_k, headdim)."""
    return flash_attn_func(q, *kv.unbind(2), bias, causal, softmax_scale)


def flash_attn_qkvpacked_func(qkv, bias=None, causal=False, softmax_scale=None):
    """flash_attn_func of qkv (batch, seqlen, 3, nheads, headdim)."""
    return flash_attn_func(*qkv.unbind(2), bias, causal, softmax_scale)


def _scores(bias: Tensor | None, softmax_scale: float | None, window_size: tuple[int, int]) -> Scores:
    return Scores(softmax_scale, False, *window_size, attn_bias=bias)


def _flash_attn_forward(q, k, v, bias=None, causal=False, softmax_scale=None):
    """-> out, softmax_lse (batch, nheads, seqlen_q rounded up to 128) fp32, softmax_scale. Not differentiable."""
    softmax_scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    with torch.no_grad():
        k, v, bias, window_size = _top_left(q, k, v, bias, causal)
        out, lse, *_ = forward(q, k, v, FIXED, _scores(bias, softmax_scale, window_size), 0.0, Run(), True, False)
    return out, torch.nn.functional.pad(lse, (0, round_multiple(lse.shape[-1], 128) - lse.shape[-1])), softmax_scale


def _flash_attn_backward(do, q, k, v, o, lse, dq, dk, dv, bias=None, causal=False, softmax_scale=None) -> None:
    """Writes dq, dk and dv; lse as _flash_attn_forward gives it."""
    if lse.shape[-1] < q.shape[1]:
        raise InvalidArgument(f"lse: expected at least seqlen_q = {q.shape[1]} columns, got {lse.shape[-1]}")
    with torch.no_grad():
        seen_k, seen_v, bias, window_size = _top_left(q, k, v, bias, causal)
        n = seen_k.shape[1]
        dk[:, n:] = 0
        dv[:, n:] = 0
        lse = lse[..., : q.shape[1]].contiguous()
        scores = _scores(bias, softmax_scale, window_size)
        _run.backward(do, q, seen_k, seen_v, o, lse, dq, dk[:, :n], dv[:, :n], None, None, None, FIXED, scores,
                      NO_DROPOUT, Run())  # fmt: skip


def _autograd_class(name: str, function):
    members = {"__doc__": f"See {function.__name__}.", "__module__": __name__, "apply": staticmethod(function)}
    return types.new_class(name, (torch.autograd.Function,), exec_body=lambda body: body.update(members))


FlashAttnFunc = _autograd_class("FlashAttnFunc", flash_attn_func)
FlashAttnKVPackedFunc = _autograd_class("FlashAttnKVPackedFunc", flash_attn_kvpacked_func)
FlashAttnQKVPackedFunc = _autograd_class("FlashAttnQKVPackedFunc", flash_attn_qkvpacked_func)
