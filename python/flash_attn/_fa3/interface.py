"""The functions of FlashAttention-3: upstream's names, signatures and results, on whatever hardware there is.

What differs from FlashAttention-2's functions: upstream's signatures have no dropout; softmax_lse is -inf where a row
sees no key, and +inf if the whole call has none; `return_attn_probs` gives (out, softmax_lse); there are lengths in use
(`seqused_q`, `seqused_k`), `qv`, chunks, fp8 inputs, and a headdim of v of its own.

Beyond upstream, keyword-only, on every function: dropout_p (not with a cache), alibi_slopes, learnable_sink (nheads)
under that name or as s_aux, attn_bias; gradients also of qv, chunks and softmax_lse; any headdim; fp32.

fp8: q, k, v are all torch.float8_e4m3fn, with q_descale, k_descale, v_descale fp32 (batch, nheads_k), by which they are
to be multiplied, and out is bf16. They are converted to bf16: K and V exactly, q after its factors. See fp8.py for the
bound of the error. No gradient; not together with qv.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flash_attn._autograd_class import autograd_class
from flash_attn._call import FIXED, Scores, Sequences, check_tensors, scores_of, show_keywords
from flash_attn._errors import InvalidArgument, InvalidType
from flash_attn._fa3 import operators  # defines torch.ops.flash_attn_3
from flash_attn._fa3.attend import attend, attend_cache, check_hints
from flash_attn._fa3.combine import flash_attn_combine
from flash_attn._fa3.fp8 import FP8, Descales
from flash_attn._fa3.private import _flash_attn_backward, _flash_attn_forward, no_partials
from flash_attn._kvcache import joining, used_keys
from flash_attn.flash_attn_interface import fake_of, maybe_contiguous, round_multiple

__all__ = [
    "FlashAttnFunc",
    "FlashAttnQKVPackedFunc",
    "FlashAttnVarlenFunc",
    "USE_TRITON_ROCM",
    "_flash_attn_backward",
    "_flash_attn_backward_fake",
    "_flash_attn_forward",
    "_flash_attn_forward_fake",
    "flash_attn_3_gpu",
    "flash_attn_combine",
    "flash_attn_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "get_scheduler_metadata",
    "maybe_contiguous",
    "round_multiple",
    "round_up_headdim",
]

USE_TRITON_ROCM = False
flash_attn_3_gpu = torch.ops.flash_attn_3
_flash_attn_forward_fake = fake_of(_flash_attn_forward, operators.fake_forward)
_flash_attn_backward_fake = fake_of(_flash_attn_backward, operators.fake_backward)

_OF_SCORES = {"alibi_slopes": None, "learnable_sink": None, "attn_bias": None, "s_aux": None}


def _extended(function):
    return show_keywords(function, {"dropout_p": 0.0, **_OF_SCORES})


def _extended_cache(function):
    return show_keywords(function, _OF_SCORES)


def _scores(softmax_scale, causal, window_size, attention_chunk, softcap, extensions: dict) -> Scores:
    chunk = {"attention_chunk": attention_chunk} if attention_chunk != 0 else {}
    if not extensions:
        return scores_of(softmax_scale, causal, window_size, softcap, None, chunk)
    for name in extensions:
        if name not in _OF_SCORES:
            raise TypeError(
                f"unexpected keyword argument {name!r}; beyond upstream's there are {', '.join(_OF_SCORES)}, and "
                "dropout_p without a cache"
            )
    sink, s_aux = extensions.get("learnable_sink"), extensions.get("s_aux")
    if sink is not None and s_aux is not None:
        raise InvalidArgument("s_aux: is learnable_sink under another name; give one of them")
    more = {
        "learnable_sink": sink if s_aux is None else s_aux,
        "attn_bias": extensions.get("attn_bias"),
        **chunk,
    }
    return scores_of(softmax_scale, causal, window_size, softcap, extensions.get("alibi_slopes"), more)


def round_up_headdim(head_size: int) -> int:
    """The headdim that upstream's kernels pad to: here none does."""
    return head_size


@_extended
def flash_attn_qkvpacked_func(
    qkv,
    softmax_scale=None,
    causal=False,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    window_size=(-1, -1),
    attention_chunk=0,
    softcap=0.0,
    deterministic=False,
    num_heads_q=None,
    sm_margin=0,
    return_attn_probs=False,
    **extensions,
):
    """Self-attention of packed inputs; see flash_attn_func.

    qkv (batch, seqlen, 3, nheads, headdim), whose gradient is one dqkv; or, with num_heads_q, (batch, seqlen,
    num_heads_q + 2 * nheads_k, headdim): heads of q, then of k, then of v. -> out (batch, seqlen, nheads, headdim).
    """
    check_tensors(qkv=qkv)
    check_hints(sm_margin=sm_margin)
    dropout_p = extensions.pop("dropout_p", 0.0)
    scores = _scores(softmax_scale, causal, window_size, attention_chunk, softcap, extensions)
    q, k, v = _unpacked(qkv, num_heads_q)
    descales = Descales(q_descale, k_descale, v_descale)
    packed = (qkv,) if qkv.dim() == 5 and qkv.dtype != FP8 else None
    name = "flash_attn_qkvpacked_func"
    return attend(
        q, k, v, None, descales, FIXED, scores, dropout_p, deterministic, return_attn_probs, name, packed=packed
    )


def _unpacked(qkv: Tensor, num_heads_q: int | None) -> tuple[Tensor, Tensor, Tensor]:
    if qkv.dim() == 5 and qkv.shape[2] == 3:
        if num_heads_q is not None and num_heads_q != qkv.shape[3]:
            raise InvalidArgument(f"num_heads_q: expected the {qkv.shape[3]} heads of qkv, or None, got {num_heads_q}")
        return qkv.unbind(2)
    if qkv.dim() != 4:
        raise InvalidArgument(
            "qkv: expected shape (batch, seqlen, 3, nheads, headdim), or (batch, seqlen, num_heads_q + 2 * nheads_k, "
            f"headdim) with num_heads_q, got {tuple(qkv.shape)}"
        )
    if num_heads_q is None:
        raise InvalidArgument("num_heads_q: required where qkv has 4 dimensions")
    heads = qkv.shape[2] - num_heads_q
    if num_heads_q < 1 or heads < 2 or heads % 2:
        raise InvalidArgument(
            f"num_heads_q: expected qkv.shape[2] = {qkv.shape[2]} to be num_heads_q + 2 * nheads_k, got {num_heads_q}"
        )
    return qkv.split([num_heads_q, heads // 2, heads // 2], dim=2)


@_extended
def flash_attn_func(
    q,
    k,
    v,
    softmax_scale=None,
    causal=False,
    qv=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    window_size=(-1, -1),
    attention_chunk=0,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
    deterministic=False,
    sm_margin=0,
    return_attn_probs=False,
    **extensions,
):
    """softmax(scale * q k^T + ...) v.

    q (batch, seqlen_q, nheads, headdim), k (batch, seqlen_k, nheads_k, headdim), v (batch, seqlen_k, nheads_k,
    headdim_v), where nheads_k divides nheads. Any strides. -> out (batch, seqlen_q, nheads, headdim_v), and with
    return_attn_probs softmax_lse (batch, nheads, seqlen_q) fp32: natural logarithm; -inf where a row sees no key, +inf
    where seqlen_k is 0.

    softmax_scale: default headdim ** -0.5, with qv (headdim + headdim_v) ** -0.5.
    causal, window_size=(left, right): aligned bottom-right, -1: no limit; see flash_attn.flash_attn_func.
    qv: (batch, seqlen_q, nheads, headdim_v): scores are q k^T + qv v^T (MLA with absorbed weights). Computed as
        attention with queries [q | qv] and keys [k | v]. Where k and v are views of one memory that lie side by side,
        in either order, they are read in place, unless a gradient is wanted; else they are copied together.
    q_descale, k_descale, v_descale: fp32 (batch, nheads_k), of fp8 inputs only; see the module.
    attention_chunk: a query sees keys of its own chunk of that many positions only; 0: off.
    softcap: scores become softcap * tanh(score / softcap), if > 0.
    num_splits (0 to 256), pack_gqa, sm_margin: how upstream's kernels run. Accepted, checked, without effect.
    """
    check_hints(num_splits, pack_gqa, sm_margin)
    dropout_p = extensions.pop("dropout_p", 0.0)
    scores = _scores(softmax_scale, causal, window_size, attention_chunk, softcap, extensions)
    descales = Descales(q_descale, k_descale, v_descale)
    return attend(
        q, k, v, qv, descales, FIXED, scores, dropout_p, deterministic, return_attn_probs, "flash_attn_func"
    )  # fmt: skip


@_extended
def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    seqused_q=None,
    seqused_k=None,
    softmax_scale=None,
    causal=False,
    qv=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    window_size=(-1, -1),
    attention_chunk=0,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
    deterministic=False,
    sm_margin=0,
    return_attn_probs=False,
    **extensions,
):
    """Attention of sequences that lie one after another; see flash_attn_func.

    q (total_q, nheads, headdim), k (total_k, nheads_k, headdim), v (total_k, nheads_k, headdim_v), qv (total_q, nheads,
    headdim_v); sequence b has rows [cu_seqlens[b], cu_seqlens[b + 1]) (int32), of which seqused_q[b] and seqused_k[b]
    (int32) count; they may be none. Other rows of out are 0. -> out (total_q, nheads, headdim_v), and with
    return_attn_probs softmax_lse (nheads, total_q).
    """
    check_hints(num_splits, pack_gqa, sm_margin)
    check_tensors(cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    dropout_p = extensions.pop("dropout_p", 0.0)
    scores = _scores(softmax_scale, causal, window_size, attention_chunk, softcap, extensions)
    sequences = Sequences(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q, seqused_k)
    descales = Descales(q_descale, k_descale, v_descale)
    name = "flash_attn_varlen_func"
    return attend(q, k, v, qv, descales, sequences, scores, dropout_p, deterministic, return_attn_probs, name)


@_extended_cache
def flash_attn_with_kvcache(
    q,
    k_cache,
    v_cache,
    k=None,
    v=None,
    qv=None,
    rotary_cos=None,
    rotary_sin=None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    page_table: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    max_seqlen_q: int | None = None,
    rotary_seqlens: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    attention_chunk=0,
    softcap=0.0,
    rotary_interleaved=True,
    scheduler_metadata=None,
    num_splits=0,
    pack_gqa=None,
    sm_margin=0,
    return_softmax_lse=False,
    **extensions,
):
    """Attention over a KV cache that new keys and values join first, in place. Not differentiable.

    q               (batch, seqlen_q, nheads, headdim), or (total_q, nheads, headdim) with cu_seqlens_q
    k_cache         (batch_cache, seqlen_cache, nheads_k, headdim), or with page_table pages of any size,
    v_cache         (num_pages, page_size, nheads_k, headdim_v)
    k, v            (batch, seqlen_new, nheads_k, headdim), or (total_new, ...) with cu_seqlens_k_new: sequence b's
                    are written to its rows [cache_seqlens[b], cache_seqlens[b] + new), and attended to
    qv              as q, with the headdim of v; see flash_attn_func. If keys join, the cache is copied
    rotary_cos      (seqlen_rotary, rotary_dim / 2), dtype of q or fp32: k is rotated to the rows it is written to, and
    rotary_sin      q to cache_seqlens + i if causal, windowed or chunked, else to cache_seqlens
    cache_seqlens   int, or int32 (batch): rows in use; stays as it is. None: all, if there is no k
    cache_batch_idx int32 (batch): the cache entry, or the row of page_table, of each sequence
    cache_leftpad   int32 (batch): rows before count not
    page_table      int32 (batch, max_pages)
    rotary_seqlens  int32 (batch): positions start there instead of at cache_seqlens
    q_descale, k_descale, v_descale: fp32 (batch, nheads_k), of fp8 inputs only (see the module); the cache in use, or
                    the pages in the table where they are fewer than all, are copied in bf16 for the call
    scheduler_metadata, num_splits, pack_gqa, sm_margin: accepted, checked, without effect

    -> out (batch, seqlen_q, nheads, headdim_v) or (total_q, ...); with return_softmax_lse out, softmax_lse fp32
    (batch, nheads, seqlen_q) or (nheads, total_q), and two empty tensors, where upstream has its partial results. A
    malformed call raises before anything is written; so do two sequences that would write one row.
    """
    check_hints(num_splits, pack_gqa, sm_margin, scheduler_metadata)
    check_tensors(q=q, k_cache=k_cache, v_cache=v_cache)
    if cu_seqlens_q is not None:
        check_tensors(cu_seqlens_q=cu_seqlens_q)
    scores = _scores(softmax_scale, causal, window_size, attention_chunk, softcap, extensions)
    seqused_k, used_k = used_keys(cache_seqlens)
    sequences = Sequences(
        cu_seqlens_q, None, max_seqlen_q, None, None, seqused_k, used_k, cache_leftpad, cache_batch_idx, page_table
    )
    groups = joining(k, v, cu_seqlens_k_new, rotary_cos, rotary_sin, rotary_interleaved, rotary_seqlens)
    descales = Descales(q_descale, k_descale, v_descale)
    out, lse = attend_cache(q, k_cache, v_cache, qv, descales, sequences, scores, *groups, return_softmax_lse)
    if not return_softmax_lse:
        return out
    return out, lse, *no_partials(out)


def get_scheduler_metadata(
    batch_size,
    max_seqlen_q,
    max_seqlen_k,
    num_heads_q,
    num_heads_kv,
    headdim,
    cache_seqlens: Tensor,
    qkv_dtype=torch.bfloat16,
    headdim_v=None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    page_size: int | None = None,
    max_seqlen_k_new=0,
    causal=False,
    window_size=(-1, -1),
    attention_chunk=0,
    has_softcap=False,
    num_splits=0,
    pack_gqa=None,
    sm_margin=0,
):
    """A plan of upstream's for flash_attn_with_kvcache: here none. -> int32 (1), zero, on the device of cache_seqlens.

    Backends plan within the call, from shapes; scheduler_metadata takes this tensor and has no effect.
    """
    check_hints(num_splits, pack_gqa, sm_margin)
    check_tensors(cache_seqlens=cache_seqlens)
    if cache_seqlens.dtype != torch.int32:
        raise InvalidType(f"cache_seqlens: expected torch.int32, got {cache_seqlens.dtype}")
    sizes = {"batch_size": batch_size, "num_heads_q": num_heads_q, "num_heads_kv": num_heads_kv, "headdim": headdim}
    for name, n in sizes.items():
        if n < 1:
            raise InvalidArgument(f"{name}: expected at least 1, got {n}")
    return torch.ops.flash_attn_3.get_scheduler_metadata(
        batch_size, max_seqlen_q, max_seqlen_k, num_heads_q, num_heads_kv, headdim,
        headdim if headdim_v is None else headdim_v, qkv_dtype, cache_seqlens, cu_seqlens_q, None, cu_seqlens_k_new,
        None, cache_leftpad, page_size, max_seqlen_k_new, causal, window_size[0], window_size[1], attention_chunk,
        has_softcap, num_splits, pack_gqa, sm_margin,
    )  # fmt: skip


_TAIL = "window_size attention_chunk softcap num_splits pack_gqa deterministic sm_margin return_softmax".split()
_DESCALES = ["q_descale", "k_descale", "v_descale"]
_FIXED_ORDER = ["q", "k", "v", "softmax_scale", "causal", "qv", *_DESCALES, *_TAIL]
_VARLEN_ORDER = [
    *("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k", "max_seqlen_q", "max_seqlen_k"),
    *_FIXED_ORDER[3:],
]
_PACKED_ORDER = [
    *("qkv", "softmax_scale", "causal", *_DESCALES, "window_size", "attention_chunk", "softcap"),
    *("deterministic", "num_heads_q", "sm_margin", "return_softmax"),
]

FlashAttnFunc = autograd_class(flash_attn_func, "FlashAttnFunc", "See flash_attn_func.", _FIXED_ORDER, 5)
FlashAttnVarlenFunc = autograd_class(
    flash_attn_varlen_func, "FlashAttnVarlenFunc", "See flash_attn_varlen_func.", _VARLEN_ORDER, 11
)
FlashAttnQKVPackedFunc = autograd_class(
    flash_attn_qkvpacked_func, "FlashAttnQKVPackedFunc", "See flash_attn_qkvpacked_func.", _PACKED_ORDER, 3
)
