"""flash_attn_with_kvcache, and its two operators: one that only reads the cache, and one that also writes to it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.profiler import record_function

from flash_attn import _run
from flash_attn._attention import OF_SCORES, OF_SEQUENCES, check_constants, plain_numbers
from flash_attn._backend import current
from flash_attn._call import NewKeys, Rotary, Run, Scores, Sequences, check_tensors, extended, scores_of
from flash_attn._errors import InvalidArgument, InvalidType, NotServed
from flash_attn._flops import cache_flops
from flash_attn._library import declare, define, pick
from flash_attn._refusal import refuse_gradient
from flash_attn._tensors import empty_lse, empty_out, is_plain

_NO_KEYS, _NO_ROTARY = NewKeys(), Rotary()


def _attend(q, k_cache, v_cache, sequences, scores, new_keys, rotary, wants_lse, positive_empty_lse):
    """-> out, softmax_lse or None."""
    out = empty_out(q, v_cache)
    lse = empty_lse(q) if wants_lse else None
    run = Run(current(), positive_empty_lse=positive_empty_lse)
    _run.forward(q, k_cache, v_cache, out, lse, sequences, scores, None, run, new_keys, rotary, cache=True)
    return out, lse


def _unnamed(group, prefix: str, call: dict):
    """A group of those arguments of an operator that have a prefix: `k` alone would mean two things."""
    return group(**{name: call[f"{prefix}_{name}"] for name in group._fields if f"{prefix}_{name}" in call})


def _operator(call: dict):
    new_keys, rotary = _unnamed(NewKeys, "new", call), _unnamed(Rotary, "rotary", call)
    sequences, scores = pick(Sequences, call), pick(Scores, call)
    groups = (sequences, scores, new_keys, rotary)
    return _attend(call["q"], call["k_cache"], call["v_cache"], *groups, True, call["positive_empty_lse"])


def _fake(call: dict):
    return empty_out(call["q"], call["v_cache"]), empty_lse(call["q"])


_GROUPS = f"{declare(Sequences, required=True)}, {declare(Scores, required=True)}, bool positive_empty_lse=True"
define(
    f"_flash_attn_kvcache_forward(Tensor q, Tensor k_cache, Tensor v_cache, {_GROUPS}) -> (Tensor, Tensor)",
    _operator,
    _fake,
    cache_flops,
)
define(
    "_flash_attn_kvcache_append(Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor? new_k, Tensor? new_v, "
    "Tensor? new_cu_seqlens, Tensor? rotary_cos, Tensor? rotary_sin, bool rotary_interleaved, "
    f"Tensor? rotary_positions, {_GROUPS}) -> (Tensor, Tensor)",
    _operator,
    _fake,
    cache_flops,
)


_NO_DERIVATIVE = "flash_attn_with_kvcache has no derivative: use flash_attn_func or flash_attn_varlen_func"


def _refused_gradient(call: dict):
    raise NotServed(_NO_DERIVATIVE)


define(
    "_flash_attn_kvcache_gradient(Tensor dout) -> Tensor",
    _refused_gradient,
    lambda call: call["dout"].new_empty(()),
    lambda call: 0,
)


def _recorded(inputs) -> list[Tensor]:
    """A number per input that has a gradient, with the input in its history. Caches that are written to are none of
    them: an earlier step of the graph may have written too, and then autograd may not look at them any more."""
    if not torch.is_grad_enabled():
        return []
    return [x[:0].sum() for x in inputs if isinstance(x, Tensor) and x.requires_grad]


class _TracedRefusal(torch.autograd.Function):
    """What refuse_gradient does, in a compiled graph, for the numbers of _recorded(): an operator in the backward
    raises where the graph runs."""

    @staticmethod
    def forward(ctx, result, *inputs):
        ctx.dtypes = [x.dtype for x in inputs]
        return result.clone()

    @staticmethod
    def backward(ctx, dresult):
        gradient = torch.ops.flash_attn._flash_attn_kvcache_gradient(dresult)
        return None, *[gradient.to(dtype) for dtype in ctx.dtypes]


def used_keys(cache_seqlens) -> tuple[Tensor | None, int | None]:
    """-> seqused_k, used_k: a table, or one number for all sequences."""
    if cache_seqlens is None or isinstance(cache_seqlens, Tensor):
        return cache_seqlens, None
    if not isinstance(cache_seqlens, int) and not hasattr(cache_seqlens, "__index__"):
        raise InvalidType(f"cache_seqlens: expected an int or a torch.Tensor, got {type(cache_seqlens).__name__}")
    if cache_seqlens < 0:
        raise InvalidArgument(f"cache_seqlens: expected at least 0, got {cache_seqlens}")
    return None, cache_seqlens


def _note_write(cache: Tensor) -> None:
    """Autograd must know if it has saved this tensor."""
    if not cache.is_inference():
        torch.autograd.graph.increment_version(cache)


def _eager(q, k_cache, v_cache, sequences, scores, new_keys, rotary, wants_lse, positive_empty_lse):
    groups = (sequences, scores, new_keys, rotary)
    results = _attend(q, k_cache, v_cache, *groups, wants_lse, positive_empty_lse)
    if new_keys.k is not None:
        _note_write(k_cache)
        _note_write(v_cache)
    return results


def _traced(q, k_cache, v_cache, sequences, scores, new_keys, rotary, positive_empty_lse):
    groups = (*plain_numbers(sequences, OF_SEQUENCES), *plain_numbers(scores, OF_SCORES), positive_empty_lse)
    ops = torch.ops.flash_attn
    joins = new_keys.k is not None or new_keys.v is not None or new_keys.cu_seqlens is not None
    rotates = rotary.cos is not None or rotary.sin is not None or rotary.positions is not None
    with torch.no_grad():  # not detached: Inductor (torch 2.13) loses writes to detached views of one tensor
        if joins or rotates:
            return ops._flash_attn_kvcache_append(q, k_cache, v_cache, *new_keys, *rotary, *groups)
        return ops._flash_attn_kvcache_forward(q, k_cache, v_cache, *groups)


def joining(
    k, v, cu_seqlens_k_new, rotary_cos, rotary_sin, rotary_interleaved, rotary_positions
) -> tuple[NewKeys, Rotary]:
    new_keys, rotary = _NO_KEYS, _NO_ROTARY
    if k is not None or v is not None or cu_seqlens_k_new is not None:
        new_keys = NewKeys(k, v, cu_seqlens_k_new)
    if rotary_cos is not None or rotary_sin is not None or rotary_positions is not None:
        rotary = Rotary(rotary_cos, rotary_sin, bool(rotary_interleaved), rotary_positions)
    return new_keys, rotary


def attend_with_cache(
    q, k_cache, v_cache, sequences, scores, new_keys, rotary, wants_lse, positive_empty_lse=True
) -> tuple[Tensor, Tensor | None]:
    """-> out, softmax_lse or None, whose derivatives raise. New keys join the caches, in place."""
    call = (q, k_cache, v_cache, sequences, scores, new_keys, rotary)
    inputs = (q, new_keys.k, new_keys.v, scores.learnable_sink, scores.attn_bias, rotary.cos, rotary.sin)
    if torch.compiler.is_compiling():
        inputs = _recorded(inputs if new_keys.k is not None else (*inputs, k_cache, v_cache))
    if not is_plain(q, k_cache, v_cache):
        out, lse = _traced(*call, positive_empty_lse)
    elif torch.autograd._profiler_enabled():
        with record_function("flash_attn_with_kvcache"):
            out, lse = _eager(*call, wants_lse, positive_empty_lse)
    else:
        out, lse = _eager(*call, wants_lse, positive_empty_lse)
    if torch.is_grad_enabled():
        check_constants(scores)
        caches = (k_cache, v_cache)
        if torch.compiler.is_compiling():
            if inputs:
                out = _TracedRefusal.apply(out, *inputs)
                lse = _TracedRefusal.apply(lse, *inputs) if wants_lse else lse
        elif lse is None:
            out = refuse_gradient(_NO_DERIVATIVE, out, inputs, caches)
        else:
            out, lse = refuse_gradient(_NO_DERIVATIVE, (out, lse), inputs, caches)
    return out, lse


@extended
def flash_attn_with_kvcache(
    q,
    k_cache,
    v_cache,
    k=None,
    v=None,
    rotary_cos=None,
    rotary_sin=None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    rotary_interleaved=True,
    alibi_slopes=None,
    num_splits=0,
    return_softmax_lse=False,
    *,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    rotary_positions: Tensor | None = None,
    **extensions,
):
    """Attention over a KV cache that new keys and values join first, in place. Not differentiable.

    q               (batch, seqlen_q, nheads, headdim), or (total_q, nheads, headdim) with cu_seqlens_q
    k_cache         (batch_cache, seqlen_cache, nheads_k, headdim), or with block_table pages of any size,
    v_cache         (num_blocks, page_size, nheads_k, headdim); v's headdim may be its own
    k, v            (batch, seqlen_new, nheads_k, headdim), or (total_new, ...) with cu_seqlens_k_new: sequence b's
                    are written to its rows [cache_seqlens[b], cache_seqlens[b] + new), and attended to
    rotary_cos      (seqlen_rotary, rotary_dim / 2), dtype of q or fp32: k is rotated to the rows it is written to, and
    rotary_sin      q to cache_seqlens + i if causal or windowed, else to cache_seqlens; rotary_dim even, <= headdim
    cache_seqlens   int, or int32 (batch): rows in use; stays as it is. None: all, if there is no k
    cache_batch_idx int32 (batch): the cache entry of each sequence; cache_leftpad int32 (batch): rows before count not
    block_table     int32 (batch, max_blocks)
    rotary_positions int32 (batch): positions start there instead of at cache_seqlens
    num_splits      accepted, and needless: keys are split by shape, with the same bits for any number of threads

    -> out (batch, seqlen_q, nheads, headdim_v) or (total_q, ...), and with return_softmax_lse softmax_lse, fp32
    (batch, nheads, seqlen_q) or (nheads, total_q). The causal mask aligns at the bottom right of all keys, the new
    ones included. A malformed call raises before anything is written; so do two sequences that would write one row.
    """
    check_tensors(q=q, k_cache=k_cache, v_cache=v_cache)
    if cu_seqlens_q is not None:
        check_tensors(cu_seqlens_q=cu_seqlens_q)
    scores = scores_of(softmax_scale, causal, window_size, softcap, alibi_slopes, extensions)
    seqused_k, used_k = used_keys(cache_seqlens)
    sequences = Sequences(
        cu_seqlens_q, None, max_seqlen_q, None, None, seqused_k, used_k, cache_leftpad, cache_batch_idx, block_table
    )
    new_keys, rotary = joining(k, v, cu_seqlens_k_new, rotary_cos, rotary_sin, rotary_interleaved, rotary_positions)
    results = attend_with_cache(q, k_cache, v_cache, sequences, scores, new_keys, rotary, return_softmax_lse)
    return results if return_softmax_lse else results[0]
