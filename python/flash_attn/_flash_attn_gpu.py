"""The functions of upstream's compiled module `flash_attn_2_cuda`, in its positional order, on every device.

Others import them from there, or as `flash_attn.flash_attn_interface.flash_attn_gpu`. `out`, `dq`, `dk` and `dv` may be
None: they are made then. The argument before the last results (`gen`, a generator) must be None, as upstream demands.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flash_attn import _attention, _ops, _run
from flash_attn._backend import current
from flash_attn._call import NewKeys, Rotary, Run, Scores, Sequences
from flash_attn._errors import InvalidArgument
from flash_attn._tensors import empty_lse, empty_out


def _check_generator(gen) -> None:
    if gen is not None:
        raise InvalidArgument("gen: expected None (masks are drawn from torch's generator of the device)")


def _forward(q, k, v, out, sequences, scores, p_dropout, return_softmax) -> list[Tensor]:
    out, lse, p, rng_state, _ = _attention.forward(
        q, k, v, sequences, scores, p_dropout, Run(current()), True, return_softmax, out=out
    )
    if p is None:
        p = q.new_empty((0,))
    return [out, lse, p, torch.empty((2,), dtype=torch.int64, device=q.device) if rng_state is None else rng_state]


def fwd(
    q, k, v, out, alibi_slopes, p_dropout, softmax_scale, is_causal, window_size_left, window_size_right, softcap,
    return_softmax, gen,
):  # fmt: skip
    """-> [out, softmax_lse, S_dmask, rng_state]."""
    _check_generator(gen)
    scores = Scores(softmax_scale, is_causal, window_size_left, window_size_right, softcap, alibi_slopes)
    return _forward(q, k, v, out, Sequences(), scores, p_dropout, return_softmax)


def varlen_fwd(
    q, k, v, out, cu_seqlens_q, cu_seqlens_k, seqused_k, leftpad_k, block_table, alibi_slopes, max_seqlen_q,
    max_seqlen_k, p_dropout, softmax_scale, zero_tensors, is_causal, window_size_left, window_size_right, softcap,
    return_softmax, gen, num_splits=0,
):  # fmt: skip
    """-> [out, softmax_lse, S_dmask, rng_state]. Rows of no sequence are zero; keys are split by shape."""
    _check_generator(gen)
    sequences = Sequences(
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_k=seqused_k, leftpad_k=leftpad_k,
        block_table=block_table,
    )  # fmt: skip
    scores = Scores(softmax_scale, is_causal, window_size_left, window_size_right, softcap, alibi_slopes)
    return _forward(q, k, v, out, sequences, scores, p_dropout, return_softmax)


def _backward(dout, q, k, v, out, lse, gradients, sequences, scores, p_dropout, deterministic, rng_state):
    dq, dk, dv = (torch.empty_like(x) if g is None else g for g, x in zip(gradients, (q, k, v), strict=True))
    run = Run(current(), None, deterministic)
    dropout = _ops.dropout_of(p_dropout, rng_state)
    _run.backward(dout, q, k, v, out, lse, dq, dk, dv, None, None, None, sequences, scores, dropout, run)
    return [dq, dk, dv, _ops.softmax_d(dout, out, sequences.cu_seqlens_q)]


def bwd(
    dout, q, k, v, out, softmax_lse, dq, dk, dv, alibi_slopes, p_dropout, softmax_scale, is_causal, window_size_left,
    window_size_right, softcap, deterministic, gen, rng_state,
):  # fmt: skip
    """-> [dq, dk, dv, softmax_d]."""
    _check_generator(gen)
    scores = Scores(softmax_scale, is_causal, window_size_left, window_size_right, softcap, alibi_slopes)
    return _backward(
        dout, q, k, v, out, softmax_lse, (dq, dk, dv), Sequences(), scores, p_dropout, deterministic, rng_state
    )


def varlen_bwd(
    dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, alibi_slopes, max_seqlen_q, max_seqlen_k,
    p_dropout, softmax_scale, zero_tensors, is_causal, window_size_left, window_size_right, softcap, deterministic,
    gen, rng_state,
):  # fmt: skip
    """-> [dq, dk, dv, softmax_d]. Rows of no sequence are zero."""
    _check_generator(gen)
    sequences = Sequences(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    scores = Scores(softmax_scale, is_causal, window_size_left, window_size_right, softcap, alibi_slopes)
    return _backward(
        dout, q, k, v, out, softmax_lse, (dq, dk, dv), sequences, scores, p_dropout, deterministic, rng_state
    )


def fwd_kvcache(
    q, kcache, vcache, k, v, seqlens_k, rotary_cos, rotary_sin, cache_batch_idx, leftpad_k, block_table, alibi_slopes,
    out, softmax_scale, is_causal, window_size_left, window_size_right, softcap, is_rotary_interleaved, num_splits,
):  # fmt: skip
    """-> [out, softmax_lse]. New keys and values join the caches, in place."""
    sequences = Sequences(
        seqused_k=seqlens_k, leftpad_k=leftpad_k, cache_batch_idx=cache_batch_idx, block_table=block_table
    )
    scores = Scores(softmax_scale, is_causal, window_size_left, window_size_right, softcap, alibi_slopes)
    out = empty_out(q, vcache) if out is None else out
    lse = empty_lse(q)
    rotary = None if rotary_cos is None else Rotary(rotary_cos, rotary_sin, is_rotary_interleaved)
    new_keys = None if k is None and v is None else NewKeys(k, v)
    _run.forward(q, kcache, vcache, out, lse, sequences, scores, None, Run(current()), new_keys, rotary, cache=True)
    return [out, lse]
