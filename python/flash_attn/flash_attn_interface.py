"""The functions of FlashAttention-2: upstream's names, signatures and results, on whatever hardware there is.

Beyond upstream: fp32 (and fp64 on the oracle), any headdim, softmax_lse is differentiable, and two keyword-only
arguments on every function:

    learnable_sink  (nheads): one more logit in each row's denominator
    attn_bias       (batch|1, nheads|1, seqlen_q|1, seqlen_k): added to the scores after softcap and ALiBi

A call that needs no gradient and that nobody traces goes straight to the compiled core: that is the short way at the
head of each function.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flash_attn import _C, _ops
from flash_attn._autograd import (
    FlashAttnFunc,
    FlashAttnKVPackedFunc,
    FlashAttnQKVPackedFunc,
    FlashAttnVarlenFunc,
    FlashAttnVarlenKVPackedFunc,
    FlashAttnVarlenQKVPackedFunc,
)
from flash_attn._backend import current
from flash_attn._kvcache import flash_attn_with_kvcache
from flash_attn._ops import check_tensors
from flash_attn._s_dmask import round_multiple

__all__ = [
    "FlashAttnFunc",
    "FlashAttnKVPackedFunc",
    "FlashAttnQKVPackedFunc",
    "FlashAttnVarlenFunc",
    "FlashAttnVarlenKVPackedFunc",
    "FlashAttnVarlenQKVPackedFunc",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "maybe_contiguous",
    "round_multiple",
]

USE_TRITON_ROCM = False

_grad_enabled = torch.is_grad_enabled
_wrapped_flash_attn_forward = torch.ops.flash_attn._flash_attn_forward
_wrapped_flash_attn_varlen_forward = torch.ops.flash_attn._flash_attn_varlen_forward
_wrapped_flash_attn_backward = torch.ops.flash_attn._flash_attn_backward
_wrapped_flash_attn_varlen_backward = torch.ops.flash_attn._flash_attn_varlen_backward


def maybe_contiguous(x: Tensor | None) -> Tensor | None:
    """x with a contiguous last dimension. (Nothing in this package needs it: all strides are honoured.)"""
    return x.contiguous() if x is not None and x.stride(-1) != 1 else x


def _get_block_size_n(device, head_dim: int, is_dropout: bool, is_causal: bool) -> int:
    """The block width with which S_dmask was normalised: here whole rows, wider than any."""
    return 1 << 30


def _flash_attn_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    return_softmax: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> out, softmax_lse, S_dmask, rng_state. Not differentiable."""
    return _wrapped_flash_attn_forward(
        q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes,
        return_softmax,
    )  # fmt: skip


def _flash_attn_varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_softmax: bool = False,
    block_table: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    zero_tensors: bool = False,
    num_splits: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> out, softmax_lse, S_dmask, rng_state. Not differentiable."""
    return _wrapped_flash_attn_varlen_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size_left, window_size_right, softcap, alibi_slopes, return_softmax, block_table, leftpad_k, seqused_k,
        zero_tensors, num_splits,
    )  # fmt: skip


def _flash_attn_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
) -> Tensor:
    """Writes dq, dk, dv; -> softmax_d."""
    return _wrapped_flash_attn_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size_left,
        window_size_right, softcap, alibi_slopes, deterministic, rng_state,
    )  # fmt: skip


def _flash_attn_varlen_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
    zero_tensors: bool = False,
) -> Tensor:
    """Writes dq, dk, dv; -> softmax_d."""
    return _wrapped_flash_attn_varlen_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic,
        rng_state, zero_tensors,
    )  # fmt: skip


def _check_packed(name: str, x: Tensor, ndim: int, parts: int) -> None:
    """qkv and kv exist in Python only, so they are checked here: the core sees their slices."""
    check_tensors(**{name: x})
    if x.dim() != ndim or x.shape[-3] != parts:
        shape = ("total" if ndim == 4 else "batch, seqlen") + f", {parts}, nheads, headdim"
        raise ValueError(f"{name}: expected shape ({shape}), got {tuple(x.shape)}")


def _distinct(*tensors) -> list:
    """The same tensors. While Dynamo traces, it refuses to see one twice among the arguments of an autograd function
    (cu_seqlens_q is cu_seqlens_k, k is v): the second becomes a view."""
    if not torch.compiler.is_compiling():
        return list(tensors)
    distinct = []
    for x in tensors:
        for y in distinct:
            if x is y:
                x = x.view_as(x)
                break
        distinct.append(x)
    return distinct


def _needs_grad(learnable_sink, attn_bias, *inputs) -> bool:
    if not _grad_enabled():
        return False
    for x in (*inputs, learnable_sink, attn_bias):
        if getattr(x, "requires_grad", False):
            return True
    return False


def _infer(
    q, k, v, sequences, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
    return_attn_probs, learnable_sink, attn_bias,
):  # fmt: skip
    """The short way. `sequences`: the seven options from cu_seqlens_q on (_options.py)."""
    if dropout_p != 0.0:
        scores = (softmax_scale, causal, *_ops.window(window_size), softcap, alibi_slopes, attn_bias, learnable_sink)
        results = _ops._run_forward(q, k, v, dropout_p, return_attn_probs, scores, sequences)
        return results[:3] if return_attn_probs else results[0]
    out = _ops.empty_out(q, v)
    lse = _ops.empty_lse(q) if return_attn_probs else None
    left, right = _ops.window(window_size)
    _C.forward(
        q, k, v, out, lse,
        (
            softmax_scale, causal, left, right, softcap, alibi_slopes, attn_bias, learnable_sink, *sequences,
            0.0, 0, 0, current(), deterministic,
        ),
    )  # fmt: skip
    return (out, lse, q.new_empty((0,))) if return_attn_probs else out


_FIXED = (None,) * 7


def flash_attn_qkvpacked_func(
    qkv,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    *,
    learnable_sink=None,
    attn_bias=None,
):
    """qkv (batch, seqlen, 3, nheads, headdim) -> out (batch, seqlen, nheads, headdim); see flash_attn_func.

    The gradient is one dqkv, written in place of slices that would have to be stacked.
    """
    _check_packed("qkv", qkv, 5, 3)
    if _ops.is_plain(qkv, qkv, qkv) and not _needs_grad(learnable_sink, attn_bias, qkv):
        return _infer(
            *qkv.unbind(2), _FIXED, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
            deterministic, return_attn_probs, learnable_sink, attn_bias,
        )  # fmt: skip
    return FlashAttnQKVPackedFunc.apply(
        qkv, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
        _grad_enabled(), learnable_sink, attn_bias,
    )  # fmt: skip


def flash_attn_kvpacked_func(
    q,
    kv,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    *,
    learnable_sink=None,
    attn_bias=None,
):
    """q (batch, seqlen_q, nheads, headdim), kv (batch, seqlen_k, 2, nheads_k, headdim) -> out; see flash_attn_func."""
    check_tensors(q=q)
    _check_packed("kv", kv, 5, 2)
    if _ops.is_plain(q, kv, kv) and not _needs_grad(learnable_sink, attn_bias, q, kv):
        return _infer(
            q, *kv.unbind(2), _FIXED, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
            deterministic, return_attn_probs, learnable_sink, attn_bias,
        )  # fmt: skip
    return FlashAttnKVPackedFunc.apply(
        q, kv, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
        _grad_enabled(), learnable_sink, attn_bias,
    )  # fmt: skip


def flash_attn_func(
    q,
    k,
    v,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    *,
    learnable_sink=None,
    attn_bias=None,
):
    """softmax(scale * q k^T + ...) v.

    q (batch, seqlen_q, nheads, headdim), k and v (batch, seqlen_k, nheads_k, headdim), where nheads_k divides nheads:
    query head h reads key head h // (nheads // nheads_k). Any strides. -> out (batch, seqlen_q, nheads, headdim).

    softmax_scale: default headdim ** -0.5.
    causal, window_size=(left, right): masks align bottom-right. Query i stands at p = i + seqlen_k - seqlen_q and sees
        the keys from p - left to p + right (-1: no limit); causal means right = 0. A row that sees no key gives 0.
    softcap: scores become softcap * tanh(score / softcap), if > 0.
    alibi_slopes: fp32 (nheads) or (batch, nheads); adds -slope * |p - j|. No gradient.
    return_attn_probs: -> out, softmax_lse (batch, nheads, seqlen_q) fp32 (natural logarithm; +inf where a row sees no
        key), and S_dmask, for tests: empty without dropout; with it (batch, nheads, seqlen_q, seqlen_k), both lengths
        rounded up to 128, in the dtype of q: exp(score - the row's largest), negative where it was dropped.
    """
    if _ops.is_plain(q, k, v) and not _needs_grad(learnable_sink, attn_bias, q, k, v):
        return _infer(
            q, k, v, _FIXED, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
            deterministic, return_attn_probs, learnable_sink, attn_bias,
        )  # fmt: skip
    check_tensors(q=q, k=k, v=v)
    q, k, v = _distinct(q, k, v)
    return FlashAttnFunc.apply(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
        return_attn_probs, _grad_enabled(), learnable_sink, attn_bias,
    )  # fmt: skip


def flash_attn_varlen_qkvpacked_func(
    qkv,
    cu_seqlens,
    max_seqlen,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    *,
    learnable_sink=None,
    attn_bias=None,
):
    """qkv (total, 3, nheads, headdim), cu_seqlens (batch + 1) int32 -> out (total, nheads, headdim).

    See flash_attn_varlen_func.
    """
    check_tensors(cu_seqlens=cu_seqlens)
    _check_packed("qkv", qkv, 4, 3)
    if _ops.is_plain(qkv, qkv, qkv) and not _needs_grad(learnable_sink, attn_bias, qkv):
        varlen = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, None, None, None)
        return _infer(
            *qkv.unbind(1), varlen, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
            deterministic, return_attn_probs, learnable_sink, attn_bias,
        )  # fmt: skip
    return FlashAttnVarlenQKVPackedFunc.apply(
        qkv, cu_seqlens, max_seqlen, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
        deterministic, return_attn_probs, _grad_enabled(), learnable_sink, attn_bias,
    )  # fmt: skip


def flash_attn_varlen_kvpacked_func(
    q,
    kv,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    *,
    learnable_sink=None,
    attn_bias=None,
):
    """q (total_q, nheads, headdim), kv (total_k, 2, nheads_k, headdim) -> out; see flash_attn_varlen_func."""
    check_tensors(q=q, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    _check_packed("kv", kv, 4, 2)
    if _ops.is_plain(q, kv, kv) and not _needs_grad(learnable_sink, attn_bias, q, kv):
        varlen = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, None, None, None)
        return _infer(
            q, *kv.unbind(1), varlen, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
            deterministic, return_attn_probs, learnable_sink, attn_bias,
        )  # fmt: skip
    cu_seqlens_q, cu_seqlens_k = _distinct(cu_seqlens_q, cu_seqlens_k)
    return FlashAttnVarlenKVPackedFunc.apply(
        q, kv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal, window_size,
        softcap, alibi_slopes, deterministic, return_attn_probs, _grad_enabled(), learnable_sink, attn_bias,
    )  # fmt: skip


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
    *,
    learnable_sink=None,
    attn_bias=None,
):
    """Attention of sequences that lie one after another.

    q (total_q, nheads, headdim), k and v (total_k, nheads_k, headdim); sequence b has rows
    [cu_seqlens[b], cu_seqlens[b + 1]) (int32), and may be empty. Rows of no sequence are 0. With block_table, k and v
    are pages (num_blocks, page_size, nheads_k, headdim). Options as in flash_attn_func; softmax_lse is
    (nheads, total_q). -> out (total_q, nheads, headdim).
    """
    check_tensors(cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    if _ops.is_plain(q, k, v) and not _needs_grad(learnable_sink, attn_bias, q, k, v):
        varlen = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, None, None, block_table)
        return _infer(
            q, k, v, varlen, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
            return_attn_probs, learnable_sink, attn_bias,
        )  # fmt: skip
    check_tensors(q=q, k=k, v=v)
    q, k, v = _distinct(q, k, v)
    cu_seqlens_q, cu_seqlens_k = _distinct(cu_seqlens_q, cu_seqlens_k)
    return FlashAttnVarlenFunc.apply(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal, window_size,
        softcap, alibi_slopes, deterministic, return_attn_probs, block_table, _grad_enabled(), learnable_sink,
        attn_bias,
    )  # fmt: skip
