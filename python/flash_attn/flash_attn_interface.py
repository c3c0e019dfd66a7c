"""The functions of FlashAttention-2: upstream's names, signatures and results, on whatever hardware there is.

Beyond upstream: fp32 (and fp64 on the oracle), any headdim, softmax_lse is differentiable, and three keyword-only
arguments on every function:

    learnable_sink   (nheads): one more logit in each row's denominator
    attn_bias        (batch|1, nheads|1, seqlen_q|1, seqlen_k): added to the scores after softcap and ALiBi
    attention_chunk  a query sees keys of its own chunk of that many positions only (FlashAttention-3's); 0: off
"""

from __future__ import annotations

import inspect

import torch
from torch import Tensor

from flash_attn import _flash_attn_gpu as flash_attn_gpu  # noqa: F401
from flash_attn import _ops  # defines torch.ops.flash_attn
from flash_attn._attention import attention
from flash_attn._autograd_class import autograd_class
from flash_attn._call import FIXED, Sequences, check_tensors, extended, scores_of
from flash_attn._errors import InvalidArgument
from flash_attn._kvcache import flash_attn_with_kvcache
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


def fake_of(function, shapes):
    """Upstream's name for the shapes of an operator's results: its arguments, tensors of uninitialised memory back."""
    signature = inspect.signature(function)

    def fake(*values, **keywords):
        call = signature.bind(*values, **keywords)
        call.apply_defaults()
        return shapes(call.arguments)

    fake.__name__ = fake.__qualname__ = f"{function.__name__}_fake"
    fake.__signature__ = signature
    return fake


_flash_attn_forward_fake = fake_of(_flash_attn_forward, _ops.fake_forward)
_flash_attn_varlen_forward_fake = fake_of(_flash_attn_varlen_forward, _ops.fake_forward)
_flash_attn_backward_fake = fake_of(_flash_attn_backward, _ops.fake_softmax_d)
_flash_attn_varlen_backward_fake = fake_of(_flash_attn_varlen_backward, _ops.fake_softmax_d)


def _check_packed(name: str, x: Tensor, ndim: int, parts: int) -> None:
    """qkv and kv exist in Python only, so they are checked here: the core sees their slices."""
    check_tensors(**{name: x})
    if x.dim() != ndim or x.shape[-3] != parts:
        shape = ("total" if ndim == 4 else "batch, seqlen") + f", {parts}, nheads, headdim"
        raise InvalidArgument(f"{name}: expected shape ({shape}), got {tuple(x.shape)}")


@extended
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
    **extensions,
):
    """qkv (batch, seqlen, 3, nheads, headdim) -> out (batch, seqlen, nheads, headdim); see flash_attn_func.

    The gradient is one dqkv, written in place of slices that would have to be stacked.
    """
    _check_packed("qkv", qkv, 5, 3)
    scores = scores_of(softmax_scale, causal, window_size, softcap, alibi_slopes, extensions)
    return attention((qkv,), FIXED, scores, dropout_p, deterministic, return_attn_probs, "flash_attn_qkvpacked_func")


@extended
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
    **extensions,
):
    """q (batch, seqlen_q, nheads, headdim), kv (batch, seqlen_k, 2, nheads_k, headdim) -> out; see flash_attn_func."""
    check_tensors(q=q)
    _check_packed("kv", kv, 5, 2)
    scores = scores_of(softmax_scale, causal, window_size, softcap, alibi_slopes, extensions)
    return attention((q, kv), FIXED, scores, dropout_p, deterministic, return_attn_probs, "flash_attn_kvpacked_func")


@extended
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
    **extensions,
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
    scores = scores_of(softmax_scale, causal, window_size, softcap, alibi_slopes, extensions)
    return attention((q, k, v), FIXED, scores, dropout_p, deterministic, return_attn_probs, "flash_attn_func")


@extended
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
    **extensions,
):
    """qkv (total, 3, nheads, headdim), cu_seqlens (batch + 1) int32 -> out (total, nheads, headdim).

    See flash_attn_varlen_func.
    """
    check_tensors(cu_seqlens=cu_seqlens)
    _check_packed("qkv", qkv, 4, 3)
    sequences = Sequences(cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    scores = scores_of(softmax_scale, causal, window_size, softcap, alibi_slopes, extensions)
    return attention(
        (qkv,), sequences, scores, dropout_p, deterministic, return_attn_probs, "flash_attn_varlen_qkvpacked_func"
    )


@extended
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
    **extensions,
):
    """q (total_q, nheads, headdim), kv (total_k, 2, nheads_k, headdim) -> out; see flash_attn_varlen_func."""
    check_tensors(q=q, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    _check_packed("kv", kv, 4, 2)
    sequences = Sequences(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    scores = scores_of(softmax_scale, causal, window_size, softcap, alibi_slopes, extensions)
    return attention(
        (q, kv), sequences, scores, dropout_p, deterministic, return_attn_probs, "flash_attn_varlen_kvpacked_func"
    )


@extended
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
    **extensions,
):
    """Attention of sequences that lie one after another.

    q (total_q, nheads, headdim), k and v (total_k, nheads_k, headdim); sequence b has rows
    [cu_seqlens[b], cu_seqlens[b + 1]) (int32), and may be empty. Rows of no sequence are 0. With block_table, k and v
    are pages (num_blocks, page_size, nheads_k, headdim). Options as in flash_attn_func; softmax_lse is
    (nheads, total_q). -> out (total_q, nheads, headdim).
    """
    check_tensors(cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    sequences = Sequences(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, block_table=block_table)
    scores = scores_of(softmax_scale, causal, window_size, softcap, alibi_slopes, extensions)
    return attention(
        (q, k, v), sequences, scores, dropout_p, deterministic, return_attn_probs, "flash_attn_varlen_func"
    )


FlashAttnFunc = autograd_class(flash_attn_func, "FlashAttnFunc", "See flash_attn_func.")
FlashAttnKVPackedFunc = autograd_class(
    flash_attn_kvpacked_func, "FlashAttnKVPackedFunc", "See flash_attn_kvpacked_func."
)
FlashAttnQKVPackedFunc = autograd_class(
    flash_attn_qkvpacked_func, "FlashAttnQKVPackedFunc", "See flash_attn_qkvpacked_func."
)
FlashAttnVarlenFunc = autograd_class(flash_attn_varlen_func, "FlashAttnVarlenFunc", "See flash_attn_varlen_func.")
FlashAttnVarlenKVPackedFunc = autograd_class(
    flash_attn_varlen_kvpacked_func, "FlashAttnVarlenKVPackedFunc", "See flash_attn_varlen_kvpacked_func."
)
FlashAttnVarlenQKVPackedFunc = autograd_class(
    flash_attn_varlen_qkvpacked_func, "FlashAttnVarlenQKVPackedFunc", "See flash_attn_varlen_qkvpacked_func."
)

from flash_attn._v1 import (  # noqa: E402, F401  # version 1's names, made of those above
    flash_attn_unpadded_func,
    flash_attn_unpadded_kvpacked_func,
    flash_attn_unpadded_qkvpacked_func,
    flash_attn_unpadded_qkvpacked_split_func,
)
