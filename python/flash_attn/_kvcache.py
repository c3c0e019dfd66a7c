"""flash_attn_with_kvcache, and its two operators: one that only reads the cache, and one that also writes to it."""

from __future__ import annotations

import torch
from torch import Tensor

from flash_attn import _C, _ops
from flash_attn._options import options


def _run(
    q, k_cache, v_cache, k, v, rotary_cos, rotary_sin, cache_seqlens, cache_batch_idx, cache_leftpad, block_table,
    softmax_scale, causal, window_size_left, window_size_right, softcap, rotary_interleaved, alibi_slopes,
    learnable_sink, attn_bias, cu_seqlens_q, max_seqlen_q, cu_seqlens_k_new, rotary_positions, lse,
):  # fmt: skip
    """-> out; writes `lse` unless it is None."""
    out = _ops.empty_out(q, v_cache)
    _C.forward_with_cache(
        q, k_cache, v_cache, out, lse, k, v, cu_seqlens_k_new, cache_batch_idx, rotary_cos, rotary_sin,
        rotary_interleaved, rotary_positions,
        options(
            softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, attn_bias,
            learnable_sink, cu_seqlens_q, None, max_seqlen_q, None, cache_seqlens, cache_leftpad, block_table,
        ),
    )  # fmt: skip
    return out


_TAIL = (
    "Tensor? cache_seqlens, Tensor? cache_batch_idx, Tensor? cache_leftpad, Tensor? block_table, float? softmax_scale, "
    "bool causal, SymInt window_size_left, SymInt window_size_right, float softcap, bool rotary_interleaved, "
    "Tensor? alibi_slopes, Tensor? learnable_sink, Tensor? attn_bias, Tensor? cu_seqlens_q, SymInt? max_seqlen_q, "
    "Tensor? cu_seqlens_k_new, Tensor? rotary_positions) -> (Tensor, Tensor)"
)


@torch.library.custom_op(
    "flash_attn::_flash_attn_kvcache_forward",
    mutates_args=(),
    schema=f"(Tensor q, Tensor k_cache, Tensor v_cache, {_TAIL}",
)
def _forward_op(q, k_cache, v_cache, *rest):
    lse = _ops.empty_lse(q)
    return _run(q, k_cache, v_cache, None, None, None, None, *rest, lse), lse


@torch.library.custom_op(
    "flash_attn::_flash_attn_kvcache_append",
    mutates_args=("k_cache", "v_cache"),
    schema="(Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor? k, Tensor? v, Tensor? rotary_cos, "
    f"Tensor? rotary_sin, {_TAIL}",
)
def _append_op(q, k_cache, v_cache, *rest):
    lse = _ops.empty_lse(q)
    return _run(q, k_cache, v_cache, *rest, lse), lse


@_forward_op.register_fake
@_append_op.register_fake
def _(q, k_cache, v_cache, *rest):
    return _ops.empty_out(q, v_cache), _ops.empty_lse(q)


def _as_lengths(cache_seqlens, q: Tensor, cu_seqlens_q: Tensor | None) -> Tensor | None:
    if cache_seqlens is None or isinstance(cache_seqlens, Tensor):
        return cache_seqlens
    if not isinstance(cache_seqlens, int) and not hasattr(cache_seqlens, "__index__"):
        raise TypeError(f"cache_seqlens: expected an int or a torch.Tensor, got {type(cache_seqlens).__name__}")
    if not -(2**31) <= cache_seqlens < 2**31:
        raise ValueError(f"cache_seqlens: expected an integer of 32 bits, got {cache_seqlens}")
    batch = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.numel() - 1
    return torch.full((batch,), cache_seqlens, dtype=torch.int32, device=q.device)


def _note_write(cache: Tensor) -> None:
    """Autograd must know if it has saved this tensor."""
    if not cache.is_inference():
        torch.autograd.graph.increment_version(cache)


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
    learnable_sink=None,
    attn_bias=None,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    rotary_positions: Tensor | None = None,
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
    _ops.check_tensors(q=q, k_cache=k_cache, v_cache=v_cache)
    if cu_seqlens_q is not None:
        _ops.check_tensors(cu_seqlens_q=cu_seqlens_q)
    left, right = _ops.window(window_size)
    writes = k is not None or v is not None
    settings = (
        _as_lengths(cache_seqlens, q, cu_seqlens_q), cache_batch_idx, cache_leftpad, block_table, softmax_scale, causal,
        left, right, softcap, bool(rotary_interleaved), alibi_slopes, learnable_sink, attn_bias, cu_seqlens_q,
        max_seqlen_q, cu_seqlens_k_new, rotary_positions,
    )  # fmt: skip
    if _ops.is_plain(q, k_cache, v_cache):
        lse = _ops.empty_lse(q) if return_softmax_lse else None
        out = _run(q, k_cache, v_cache, k, v, rotary_cos, rotary_sin, *settings, lse)
        if writes:
            _note_write(k_cache)
            _note_write(v_cache)
    else:
        ops = torch.ops.flash_attn
        with torch.no_grad():  # not detached: Inductor (torch 2.13) loses writes to detached views of one tensor
            if writes or rotary_cos is not None or rotary_sin is not None:
                out, lse = ops._flash_attn_kvcache_append(q, k_cache, v_cache, k, v, rotary_cos, rotary_sin, *settings)
            else:
                out, lse = ops._flash_attn_kvcache_forward(q, k_cache, v_cache, *settings)
    return (out, lse) if return_softmax_lse else out
