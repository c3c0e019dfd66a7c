"""attention and attention_backward for any array: NumPy, JAX, CuPy, torch, whatever speaks DLPack. Needs no torch.

Memory of the CPU goes to the core as it is, and results are made in the kind of q. Memory of a device becomes torch's
views of it, since the engines of devices are written in PyTorch and Triton; without torch nobody serves it.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from flash_attn import _arrays_cpu
from flash_attn._arrays_cpu import is_a, on_a_device
from flash_attn._call import FIXED, Scores, Sequences, scores_of
from flash_attn._errors import InvalidArgument, InvalidType, NotServed


class Gradients(NamedTuple):
    """Of the arguments of attention_backward, in their kind and dtype; None where there is no such argument."""

    dq: Any
    dk: Any
    dv: Any
    dbias: Any = None
    dsink: Any = None


def attention(
    q,
    k,
    v,
    *,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    bias=None,
    alibi_slopes=None,
    sink=None,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    seqused_q=None,
    seqused_k=None,
    block_table=None,
    attention_chunk: int = 0,
    return_lse: bool = False,
    out=None,
):
    """softmax(q k^T softmax_scale) v, exact, in memory linear in the sequence length.

    Arrays of one kind: torch.Tensor (with autograd), jax.Array (with gradient, also under jit and vmap:
    flash_attn.jax), numpy.ndarray (bfloat16 is that of ml_dtypes), or any other with `__dlpack__` and
    `__array_namespace__`. Any strides.

    q             (batch, seqlen_q, nheads, headdim), or packed (total_q, nheads, headdim) with cu_seqlens_q;
                  float16, bfloat16 or float32 (float64 slowly)
    k, v          (batch, seqlen_k, nheads_k, headdim | headdim_v), or packed; nheads is a multiple of nheads_k
    causal        query i sees keys up to i + seqlen_k - seqlen_q
    window_size   (left, right) keys around that position are seen; -1: no limit
    softmax_scale default headdim ** -0.5
    softcap       scores become softcap * tanh(scores / softcap); 0: off
    bias          (batch|1, nheads|1, seqlen_q|1, seqlen_k), added to the scores; -inf hides a key
    alibi_slopes  float32 (nheads) or (batch, nheads): -slope * distance is added to the scores. No gradient
    sink          (nheads): one more logit in each row's denominator
    cu_seqlens_*  int32 (batch + 1): sequence b has rows [cu_seqlens[b], cu_seqlens[b + 1])
    max_seqlen_*  at least the longest sequence's; None: found from cu_seqlens
    seqused_*     int32 (batch): only that many queries, keys of each sequence
    block_table   int32 (batch, max_blocks): k and v are pages (num_blocks, page_size, nheads_k, headdim); needs
                  seqused_k. No gradient
    attention_chunk  a query sees keys of its own chunk of that many positions only; 0: off
    out           memory for the result, (..., nheads, headdim_v); not for JAX, nor where torch records gradients

    -> out, or (out, lse) with return_lse: float32 (batch, nheads, seqlen_q) or (nheads, total_q), the natural logarithm
    of the softmax's denominator. A row that sees nothing has out = 0 and lse = -inf.

    Raises InvalidArgument (ValueError), InvalidType (TypeError), NotServed (NotImplementedError); nothing was written.
    """
    sequences = _sequences(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q, seqused_k, block_table)
    try:
        scores = _scores(causal, window_size, softmax_scale, softcap, bias, alibi_slopes, sink, attention_chunk)
        return _engine_of(q, k, v).attention(q, k, v, sequences, scores, return_lse, out)
    except _ERRORS as e:
        raise type(e)(_words(e)) from None


def attention_backward(
    dout,
    q,
    k,
    v,
    out,
    lse,
    *,
    dlse=None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    bias=None,
    alibi_slopes=None,
    sink=None,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    seqused_q=None,
    seqused_k=None,
    attention_chunk: int = 0,
    bias_gradient: bool = True,
) -> Gradients:
    """The gradient of attention, for those without autograd.

    dout is that of a loss by out, and dlse (optional, float32) by lse. out and lse are attention's results, and all
    keywords are those of its call. bias_gradient=False spares dbias, which is as large as bias.

    -> Gradients(dq, dk, dv, dbias, dsink), the last two None unless there is a bias, a sink. Raises as attention does.
    """
    sequences = _sequences(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q, seqused_k)
    try:
        scores = _scores(causal, window_size, softmax_scale, softcap, bias, alibi_slopes, sink, attention_chunk)
        backward = _engine_of(q, k, v).attention_backward
        wants_dbias = bias is not None and bias_gradient
        return Gradients(*backward(dout, q, k, v, out, lse, dlse, sequences, scores, wants_dbias))
    except _ERRORS as e:
        raise type(e)(_words(e)) from None


_ERRORS = (InvalidArgument, InvalidType, NotServed)
_OUR_NAMES = {"attn_bias": "bias", "learnable_sink": "sink", "softmax_lse": "lse"}


def _words(error: Exception) -> str:
    """The core's message, with the names of these functions' arguments."""
    return re.sub(r"\b(attn_bias|learnable_sink|softmax_lse)\b", lambda m: _OUR_NAMES[m[0]], str(error))


def _sequences(*values) -> Sequences:
    if all(x is None for x in values):
        return FIXED
    return Sequences(*values[:6], block_table=values[6] if len(values) > 6 else None)


def _scores(causal, window_size, softmax_scale, softcap, bias, alibi_slopes, sink, attention_chunk) -> Scores:
    extensions = {"learnable_sink": sink, "attn_bias": bias, "attention_chunk": attention_chunk}
    return scores_of(softmax_scale, causal, window_size, softcap, alibi_slopes, extensions)


def _engine_of(*arrays):
    """What serves this kind of array: a module with attention and attention_backward."""
    for x in arrays:
        if is_a(x, "torch", "Tensor"):
            from flash_attn import _arrays_torch

            return _arrays_torch
        if is_a(x, "jax", "Array"):
            from flash_attn import _arrays_device, _arrays_jax

            return _arrays_device if _arrays_jax.is_on_a_device(x) else _arrays_jax
    if on_a_device(arrays[0]):
        from flash_attn import _arrays_device

        return _arrays_device
    return _arrays_cpu
