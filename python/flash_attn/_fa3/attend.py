"""One call of FlashAttention-3: qv and fp8 inputs become ordinary attention, which takes the path of all calls."""

from __future__ import annotations

import torch
from torch import Tensor

from flash_attn._attention import attention
from flash_attn._call import NewKeys, Rotary, Scores, Sequences, check_tensors
from flash_attn._errors import InvalidArgument, InvalidType
from flash_attn._fa3 import fp8
from flash_attn._fa3.fp8 import Descales
from flash_attn._fa3.merge import check_qv, join, merge
from flash_attn._kvcache import attend_with_cache
from flash_attn._tensors import is_plain

_MAX_SPLITS = 256


def check_hints(num_splits=1, pack_gqa=None, sm_margin=0, scheduler_metadata=None) -> None:
    """How upstream's kernels are to run. Results here do not depend on it."""
    if num_splits in (0, 1) and pack_gqa is None and sm_margin == 0 and scheduler_metadata is None:
        return  # what nearly all calls give
    for name, x, most in (("num_splits", num_splits, _MAX_SPLITS), ("sm_margin", sm_margin, None)):
        if isinstance(x, bool) or not (isinstance(x, (int, torch.SymInt)) or hasattr(x, "__index__")):
            raise InvalidType(f"{name}: expected an integer, got {type(x).__name__}")
        if x < 0 or (most is not None and x > most):
            raise InvalidArgument(f"{name}: expected at least 0{'' if most is None else f', at most {most}'}, got {x}")
    if pack_gqa is not None and not isinstance(pack_gqa, int):
        raise InvalidType(f"pack_gqa: expected a bool or None, got {type(pack_gqa).__name__}")
    if scheduler_metadata is not None:
        check_tensors(scheduler_metadata=scheduler_metadata)
        if scheduler_metadata.dtype != torch.int32:
            raise InvalidType(f"scheduler_metadata: expected torch.int32, got {scheduler_metadata.dtype}")


def _needs_grad(scores: Scores, *inputs) -> bool:
    if not torch.is_grad_enabled():
        return False
    for x in (*inputs, scores.learnable_sink, scores.attn_bias):
        if isinstance(x, Tensor) and x.requires_grad:
            return True
    return False


def _no_keys(k: Tensor, packed: bool) -> bool:
    """Whether there is no key in the whole call: then FlashAttention-3's lse is +inf, not -inf."""
    return k.dim() > 1 and k.shape[0 if packed else 1] == 0


def _by_operator(q, k, v, qv, sequences: Sequences, scores: Scores) -> tuple[Tensor, Tensor]:
    """-> out, softmax_lse of a traced call with qv: where the operator runs, memory can be looked at."""
    out, lse, *_ = torch.ops.flash_attn_3._fwd(
        q, k, v, None, None, qv, None, sequences.cu_seqlens_q, sequences.cu_seqlens_k, None, sequences.seqused_q,
        sequences.seqused_k, sequences.max_seqlen_q, sequences.max_seqlen_k, sequences.block_table,
        sequences.cache_batch_idx, sequences.leftpad_k, None, None, None, None, None, None, scores.softmax_scale,
        scores.causal, scores.window_size_left, scores.window_size_right, scores.attention_chunk, scores.softcap,
        alibi_slopes=scores.alibi_slopes, learnable_sink=scores.learnable_sink, attn_bias=scores.attn_bias,
        used_k=sequences.used_k,
    )  # fmt: skip
    return out, lse


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qv: Tensor | None,
    descales: Descales,
    sequences: Sequences,
    scores: Scores,
    dropout_p: float,
    deterministic: bool,
    wants_lse: bool,
    name: str,
    in_operator: bool = False,
    packed: tuple | None = None,
):
    """Without a cache. `packed`: (qkv,), of which q, k and v are views. -> out, or (out, softmax_lse)."""
    check_tensors(q=q, k=k, v=v)
    inputs, is_fp8 = packed or (q, k, v), fp8.uses_fp8(q, {"k": k, "v": v}, descales)
    if is_fp8:
        fp8.check(q, k, qv, False, descales, sequences, _needs_grad(scores, q, k, v))
        inputs = fp8.widened_q(q, descales, sequences), k.to(torch.bfloat16), v.to(torch.bfloat16)
    elif qv is not None:
        check_qv(q, v, qv)
        needs_grad = _needs_grad(scores, q, k, v, qv)
        traced = not in_operator and not is_plain(q, k, v, qv)
        if traced and not needs_grad and dropout_p == 0.0:
            results = _by_operator(q, k, v, qv, sequences, scores)
            return results if wants_lse else results[0]
        inputs = (*merge(q, k, v, qv, in_place=not traced and not needs_grad), v)
    positive = _no_keys(k, sequences.cu_seqlens_k is not None)
    results = attention(inputs, sequences, scores, dropout_p, deterministic, wants_lse, name, positive)
    out, lse = results[:2] if wants_lse else (results, None)
    if is_fp8:
        out = fp8.descaled_out(out, descales, sequences)
    return (out, lse) if wants_lse else out


def attend_cache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    qv: Tensor | None,
    descales: Descales,
    sequences: Sequences,
    scores: Scores,
    new_keys: NewKeys,
    rotary: Rotary,
    wants_lse: bool,
    in_operator: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """With a cache, that new keys join in place. -> out, softmax_lse or None."""
    check_tensors(q=q, k_cache=k_cache, v_cache=v_cache)
    if sequences.block_table is not None and sequences.cache_batch_idx is not None:
        sequences = _rows_of_table(sequences)
    joins = new_keys.k is not None or new_keys.v is not None
    positive = _no_keys(k_cache, sequences.cu_seqlens_k is not None) and not joins
    of_dtype = {"k_cache": k_cache, "v_cache": v_cache, "k": new_keys.k, "v": new_keys.v}
    call = (q, k_cache, v_cache, sequences, scores, new_keys, rotary)
    if fp8.uses_fp8(q, of_dtype, descales):
        needs_grad = _needs_grad(scores, q, k_cache, v_cache, new_keys.k, new_keys.v)
        fp8.check(q, k_cache, qv, rotary.cos is not None, descales, sequences, needs_grad)
        out, lse = _with_fp8_cache(call, descales, wants_lse, positive)
        return fp8.descaled_out(out, descales, sequences), lse
    if qv is None:
        return attend_with_cache(*call, wants_lse, positive)

    check_qv(q, v_cache, qv)
    if rotary.cos is not None and rotary.cos.dim() == 2 and 2 * rotary.cos.shape[1] > q.shape[-1]:
        raise InvalidArgument(
            f"rotary_cos: expected at most headdim / 2 = {q.shape[-1] // 2} columns, got {rotary.cos.shape[1]}"
        )
    if not joins:
        traced = not in_operator and not is_plain(q, k_cache, v_cache, qv)
        if traced and not _needs_grad(scores, q, k_cache, v_cache, qv):
            return _by_operator(q, k_cache, v_cache, qv, sequences, scores)
        queries, keys = merge(q, k_cache, v_cache, qv, in_place=not traced)
        return attend_with_cache(queries, keys, v_cache, sequences, scores, new_keys, rotary, wants_lse, positive)
    # New keys join a copy of the cache, [k | v], and v_cache; then their first columns belong to k_cache.
    if isinstance(new_keys.k, Tensor) and isinstance(new_keys.v, Tensor):
        new_keys = NewKeys(join(new_keys.k, new_keys.v), new_keys.v, new_keys.cu_seqlens)  # torch 2.4: no _replace
    queries, keys = torch.cat([q, qv], -1), join(k_cache, v_cache)
    results = attend_with_cache(queries, keys, v_cache, sequences, scores, new_keys, rotary, wants_lse, positive)
    with torch.no_grad():
        k_cache.copy_(keys[..., : k_cache.shape[-1]])
    return results


def _rows_of_table(sequences: Sequences) -> Sequences:
    """cache_batch_idx of pages: sequence b has the row cache_batch_idx[b] of the table."""
    table, index = sequences.block_table, sequences.cache_batch_idx
    check_tensors(page_table=table, cache_batch_idx=index)
    if {index.dtype, table.dtype} != {torch.int32} or index.dim() != 1 or table.dim() != 2:
        raise InvalidArgument(
            "cache_batch_idx, page_table: expected int32 (batch) and int32 (rows, max_pages), got "
            f"{index.dtype} {tuple(index.shape)} and {table.dtype} {tuple(table.shape)}"
        )
    if index.device.type == "cpu" and is_plain(index) and index.numel():
        if int(index.min()) < 0 or int(index.max()) >= table.shape[0]:
            raise InvalidArgument(f"cache_batch_idx: expected rows of page_table, 0 to {table.shape[0] - 1}")
    else:  # on a device nobody reads it: any row, but one of the table
        index = index.clamp(0, max(table.shape[0] - 1, 0))
    return sequences._replace(block_table=table.index_select(0, index), cache_batch_idx=None)


def _with_fp8_cache(call: tuple, descales: Descales, wants_lse: bool, positive: bool) -> tuple[Tensor, Tensor | None]:
    q, k_cache, v_cache, sequences, scores, new_keys, rotary = call
    joins = new_keys.k is not None or new_keys.v is not None
    queries = fp8.widened_q(q, descales, sequences)
    if not joins:
        keys, values, sequences = fp8.widened_pages(k_cache, v_cache, sequences)
        return attend_with_cache(queries, keys, values, sequences, scores, new_keys, rotary, wants_lse, positive)
    keys, values = k_cache.to(torch.bfloat16), v_cache.to(torch.bfloat16)
    new = [x.to(torch.bfloat16) if isinstance(x, Tensor) else x for x in (new_keys.k, new_keys.v)]
    new_keys = NewKeys(*new, new_keys.cu_seqlens)
    results = attend_with_cache(queries, keys, values, sequences, scores, new_keys, rotary, wants_lse, positive)
    with torch.no_grad():  # exact: whatever the copies hold has been e4m3 before
        k_cache.copy_(keys)
        v_cache.copy_(values)
    return results
