"""FlashAttention-4's functions: its names, signatures and results (flash-attn-4 4.0.0b36), on every device.

Beyond it: every dtype, head dimension and device that this package serves; functions written in PyTorch where it takes
the CuTe DSL's, with autograd's gradient, also to the tensors they read.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from flash_attn import _attention, _modified, _run
from flash_attn._autograd_class import autograd_class
from flash_attn._backend import current
from flash_attn._call import Run, Scores, Sequences, check_tensors
from flash_attn._engines.torch.mods import Mods
from flash_attn._errors import InvalidArgument, NotServed
from flash_attn._tensors import empty_lse, empty_out
from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch, block_lists
from flash_attn.cute.combine import flash_attn_combine
from flash_attn.cute.functions import adapted, check_aux_tensors

__all__ = [
    "FlashAttnFunc",
    "FlashAttnVarlenFunc",
    "SchedulerMetadataTensorsTorch",
    "flash_attn_combine",
    "flash_attn_func",
    "flash_attn_varlen_func",
    "get_scheduler_metadata",
]


class SchedulerMetadataTensorsTorch(NamedTuple):
    """How FlashAttention-4 deals out the work of a call. Nothing here needs it."""

    num_m_blocks_ptr: Tensor | None = None
    num_splits_dynamic_ptr: Tensor | None = None
    virtual_batch_idx_ptr: Tensor | None = None
    num_nheads_in_l2_ptr: Tensor | None = None
    tile_count_semaphore: Tensor | None = None
    cu_total_m_blocks: Tensor | None = None
    cu_total_splits_m_blocks: Tensor | None = None


class _Functions(NamedTuple):
    """What a caller makes of scores."""

    score_mod: Callable | None = None
    score_mod_bwd: Callable | None = None
    mask_mod: Callable | None = None
    aux_tensors: list | None = None
    aux_scalars: tuple | None = None
    block_sparse_tensors: BlockSparseTensorsTorch | None = None


def _change_scores(f: _Functions) -> bool:
    changes = (f.score_mod, f.score_mod_bwd, f.mask_mod, f.block_sparse_tensors)
    return any(x is not None for x in changes)


def _limits(causal, left, right, mask_mod) -> tuple[bool, int, int]:
    """Of a window in FlashAttention-4's words, where None is no limit, in ours, where -1 is."""
    for name, x in (("left", left), ("right", right)):
        if x is not None and int(x) < 0 and not (left is not None and right is not None and int(left) < 0 > int(right)):
            raise InvalidArgument(f"window_size: expected None, for no limit, or at least 0 on the {name}, got {x}")
    left, right = (-1 if x is None or int(x) < 0 else int(x) for x in (left, right))
    if mask_mod is not None:
        if causal or left >= 0 or right >= 0:
            words = "mask_mod is the whole mask, as in FlashAttention-4: causal and window_size are not applied"
            warnings.warn(words, stacklevel=4)
        return False, -1, -1
    return bool(causal), left, right


def _scores(softmax_scale, causal, window_size, softcap, learnable_sink, functions: _Functions) -> Scores:
    try:
        left, right = window_size
    except (TypeError, ValueError):
        raise InvalidArgument(f"window_size: expected two integers or None, got {window_size!r}") from None
    if softcap and functions.score_mod is not None:
        raise InvalidArgument("softcap: expected 0 with score_mod, which may do the same; as in FlashAttention-4")
    causal, left, right = _limits(causal, left, right, functions.mask_mod)
    return Scores(softmax_scale, causal, left, right, softcap or 0.0, None, learnable_sink)


def _sequences(q, v, cu_q, cu_k, max_q, max_k, used_q, used_k, page_table) -> Sequences:
    """Tables on a device are not read: there all rows are the bound of one sequence's that is not given."""

    def bound(cu, most, x):
        is_read = cu is None or most is not None or not isinstance(cu, Tensor) or cu.device.type == "cpu"
        return most if is_read or not isinstance(x, Tensor) or not x.dim() else x.shape[0]

    max_q, max_k = bound(cu_q, max_q, q), bound(cu_k, max_k, v)
    return Sequences(cu_q, cu_k, max_q, max_k, used_q, used_k, block_table=page_table)


def _refuse_gathering(gather_kv_indices) -> None:
    if gather_kv_indices is not None:
        raise NotServed("gather_kv_indices: lists of keys for each query are not served; pass block_sparse_tensors")


def _operands(q, k, v, qv):
    """q, k, v of the same scores without `qv`: q k^T + qv v^T is one product of longer rows."""
    if qv is None:
        check_tensors(q=q, k=k, v=v)
        return q, k, v
    check_tensors(qv=qv, v=v)
    if q is None:
        return qv, v, v
    check_tensors(q=q, k=k)
    if k is v:
        raise NotServed("qv: with k and v the same tensor FlashAttention-4 drops q; pass q=None to mean that")
    if q.shape[:-1] != qv.shape[:-1] or qv.shape[-1:] != v.shape[-1:] or k.shape[:-1] != v.shape[:-1]:
        raise InvalidArgument(
            f"qv: expected the shape of q with the headdim of v, got {tuple(qv.shape)} with q {tuple(q.shape)}, k "
            f"{tuple(k.shape)}, v {tuple(v.shape)}"
        )
    return torch.cat([q, qv], -1), torch.cat([k, v], -1), v


def _call(q, k, v, sequences, scores, functions: _Functions, deterministic=False, by_keys=False):
    """The call of _modified.py, checked."""
    check_aux_tensors(functions.aux_tensors)
    aux = functions.aux_tensors, functions.aux_scalars
    made = {name: adapted(name, getattr(functions, name), *aux) for name in ("score_mod", "mask_mod", "score_mod_bwd")}
    if made["score_mod_bwd"] is not None and made["score_mod"] is None:
        raise InvalidArgument("score_mod_bwd: expected None without score_mod")
    _modified.check(q, k, v, sequences, scores)
    blocks = block_lists(functions.block_sparse_tensors, "block_sparse_tensors", q, k, sequences, by_keys)
    return _modified.Call(sequences, scores, Mods(**made, blocks=blocks), bool(deterministic))


@torch.compiler.disable  # a graph is broken here
def _attend_modified(q, k, v, sequences, scores, functions, deterministic, return_lse):
    return _modified.attention(_call(q, k, v, sequences, scores, functions, deterministic), q, k, v, return_lse)


def _attend(q, k, v, qv, sequences, scores, functions, deterministic, return_lse, name) -> tuple[Tensor, Tensor | None]:
    q, k, v = _operands(q, k, v, qv)
    if _change_scores(functions):
        out, lse = _attend_modified(q, k, v, sequences, scores, functions, deterministic, return_lse)
    else:
        inputs = (q, k, v, scores.learnable_sink)
        wants_lse = return_lse or (torch.is_grad_enabled() and any(getattr(x, "requires_grad", False) for x in inputs))
        out = _attention.attention(
            (q, k, v), sequences, scores, 0.0, deterministic, wants_lse, name, positive_empty_lse=False
        )
        out, lse = out[:2] if wants_lse else (out, None)
    return out, lse if lse is None or qv is None else lse.transpose(-1, -2)


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qv: Tensor | None = None,
    gather_kv_indices: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (None, None),
    learnable_sink: Tensor | None = None,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    score_mod: Callable | None = None,
    score_mod_bwd: Callable | None = None,
    mask_mod: Callable | None = None,
    aux_tensors: list | None = None,
    aux_scalars: tuple | None = None,
    block_sparse_tensors: BlockSparseTensorsTorch | None = None,
    block_sparse_tensors_bwd: BlockSparseTensorsTorch | None = None,
    return_lse: bool = False,
    gather_bwd_recompute_p: bool = False,
    gather_bwd_token_chunk: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """softmax(scale * q k^T, changed by score_mod, where mask_mod) v.

    q (batch, seqlen_q, nheads, headdim), k (batch, seqlen_k, nheads_k, headdim), v (..., headdim_v), where nheads_k
    divides nheads. -> out (batch, seqlen_q, nheads, headdim_v), lse: fp32 (batch, nheads, seqlen_q), natural, -inf
    where a row sees nothing and has no sink; None unless return_lse, or a gradient is wanted. Both have gradients.

    qv              (batch, seqlen_q, nheads, headdim_v): scores are scale * (q k^T + qv v^T); lse is then (batch,
                    seqlen_q, nheads). q and k may be None. k and v are copied side by side.
    softmax_scale   default headdim ** -0.5, with qv (headdim + headdim_v) ** -0.5
    causal, window_size=(left, right)  aligned bottom-right; None is no limit
    learnable_sink  (nheads): one more logit in each row's denominator, and in lse; with gradient
    score_mod       (score, b, h, q_idx, kv_idx[, aux_tensors]) -> score, of numbers, written in PyTorch: the score
                    after the scale, fp32. Its gradient is autograd's, also to tensors that it reads, from aux_tensors
                    or from anywhere; or score_mod_bwd(dscore, score, b, h, q_idx, kv_idx[, aux_tensors]) -> dscore.
                    Also with FlashAttention-4's parameters (..., kv_idx, seqlen_info, aux_tensors[, aux_scalars]).
                    Tensors of 16 bits that it reads count in fp32.
    mask_mod        (b, h, q_idx, kv_idx[, aux_tensors]) -> bool: the whole mask; causal and window_size are not applied
    block_sparse_tensors  lists of blocks (flash_attn.cute.block_sparsity): what none names is not computed, forward and
                    backward. block_sparse_tensors_bwd, the same by keys, is accepted: the backward walks the forward's.

    These three run on the `torch` backend, on every device, with memory linear in seqlen; lists are read by the host.
    num_splits, pack_gqa and gather_bwd_* are accepted: they say how to compute, not what. gather_kv_indices is refused.
    """
    _refuse_gathering(gather_kv_indices)
    functions = _Functions(score_mod, score_mod_bwd, mask_mod, aux_tensors, aux_scalars, block_sparse_tensors)
    if block_sparse_tensors_bwd is not None and block_sparse_tensors is None:
        raise InvalidArgument("block_sparse_tensors_bwd: expected None without block_sparse_tensors")
    scores = _scores(softmax_scale, causal, window_size, softcap, learnable_sink, functions)
    return _attend(
        q, k, v, qv, Sequences(), scores, functions, deterministic, return_lse, "flash_attn.cute.flash_attn_func"
    )


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qv: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    min_seqlen_k: int | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    gather_kv_indices: Tensor | None = None,
    page_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (None, None),
    learnable_sink: Tensor | None = None,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    score_mod: Callable | None = None,
    score_mod_bwd: Callable | None = None,
    mask_mod: Callable | None = None,
    block_sparse_tensors: BlockSparseTensorsTorch | None = None,
    aux_tensors: list | None = None,
    aux_scalars: tuple | None = None,
    return_lse: bool = False,
    scheduler_metadata: SchedulerMetadataTensorsTorch | None = None,
    seqlen_k_per_split: int | None = None,
    disable_scheduler_metadata: bool = False,
    gather_bwd_recompute_p: bool = False,
    gather_bwd_token_chunk: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """flash_attn_func of sequences of their own lengths.

    q (total_q, nheads, headdim) with cu_seqlens_q, int32 (batch + 1); else (batch, seqlen_q, nheads, headdim). k and v
    alike; or with page_table, int32 (batch, max_pages), pages (num_pages, page_size, nheads_k, headdim), which have no
    gradient. seqused_q, seqused_k, int32 (batch): rows in use of each sequence. Rows of no sequence are 0.

    -> out of the shape of q, with v's headdim; lse (nheads, total_q) or (batch, nheads, seqlen_q), as
    flash_attn_func's. score_mod and mask_mod get positions within a sequence; seqlen_info.offset_q and offset_k are
    those of its first rows.
    min_seqlen_k, scheduler_metadata, seqlen_k_per_split and disable_scheduler_metadata are accepted: they tune.
    """
    _refuse_gathering(gather_kv_indices)
    functions = _Functions(score_mod, score_mod_bwd, mask_mod, aux_tensors, aux_scalars, block_sparse_tensors)
    scores = _scores(softmax_scale, causal, window_size, softcap, learnable_sink, functions)
    sequences = _sequences(
        qv if q is None else q,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        seqused_q,
        seqused_k,
        page_table,
    )
    return _attend(
        q, k, v, qv, sequences, scores, functions, deterministic, return_lse, "flash_attn.cute.flash_attn_varlen_func"
    )


FlashAttnFunc = autograd_class(
    flash_attn_func, "FlashAttnFunc", "apply: flash_attn_func.", inspect.signature(flash_attn_func).parameters, 3
)
_LENGTHS = ("max_seqlen_q", "max_seqlen_k", "min_seqlen_k", "seqused_q", "seqused_k")
_names = [name for name in inspect.signature(flash_attn_varlen_func).parameters if name not in _LENGTHS]
_names[6:6] = ("seqused_q", "seqused_k", "max_seqlen_q", "max_seqlen_k", "min_seqlen_k")
FlashAttnVarlenFunc = autograd_class(
    flash_attn_varlen_func, "FlashAttnVarlenFunc", "apply: flash_attn_varlen_func.", _names, 3
)


@torch.no_grad()
def _flash_attn_fwd(
    q: Tensor | None,
    k: Tensor | None,
    v: Tensor,
    qv: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    min_seqlen_k: int | None = None,
    page_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    softcap: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    learnable_sink: Tensor | None = None,
    tile_mn: tuple[int, int] | None = None,
    mma_pv_is_rs: bool | None = None,
    intra_wg_overlap: bool | None = None,
    num_threads: int = 384,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    _arch: int | None = None,
    score_mod: Callable | None = None,
    mask_mod: Callable | None = None,
    block_sparse_tensors: BlockSparseTensorsTorch | None = None,
    return_lse: bool = False,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    aux_tensors: list[Tensor] | None = None,
    aux_scalars: tuple | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    gather_kv_indices: Tensor | None = None,
    scheduler_metadata: SchedulerMetadataTensorsTorch | None = None,
    seqlen_k_per_split: int | None = None,
    disable_scheduler_metadata: bool = False,
    gather_bwd_recompute_p: bool = False,
) -> tuple[Tensor, Tensor | None, None, None]:
    """The forward alone: -> out, lse, and two results of sparse MLA, None. Writes `out` and `lse` where given.

    lse is None unless return_lse, or an input requires a gradient. No result has one.
    """
    _refuse_gathering(gather_kv_indices)
    for name, x in (("q_descale", q_descale), ("k_descale", k_descale), ("v_descale", v_descale)):
        if x is not None:
            raise NotServed(f"{name}: fp8 inputs are not served by flash_attn.cute")
    functions = _Functions(score_mod, None, mask_mod, aux_tensors, aux_scalars, block_sparse_tensors)
    window_size = (window_size_left, window_size_right)
    scores = _scores(softmax_scale, causal, window_size, softcap, learnable_sink, functions)
    wants_lse = return_lse or any(getattr(x, "requires_grad", False) for x in (q, k, v, qv, learnable_sink))
    q, k, v = _operands(q, k, v, qv)
    sequences = _sequences(
        q, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q, seqused_k, page_table
    )
    out = empty_out(q, v) if out is None else out
    if qv is not None and lse is not None:
        lse = lse.transpose(-1, -2)
    elif lse is None and wants_lse:
        lse = empty_lse(q)
    if _change_scores(functions):
        call = _modified.prepared(_call(q, k, v, sequences, scores, functions), q, k, v, False)
        _modified.forward(call, q, k, v, out, lse)
    else:
        _run.forward(q, k, v, out, lse, sequences, scores, None, Run(current(), positive_empty_lse=False))
    return out, lse if lse is None or qv is None else lse.transpose(-1, -2), None, None


@torch.no_grad()
def _flash_attn_bwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    dout: Tensor,
    lse: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    softcap: float = 0.0,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    m_block_size: int = 64,
    n_block_size: int = 128,
    num_threads: int = 256,
    pack_gqa: bool = False,
    num_stages_Q: int = 2,
    num_stages_dO: int = 2,
    SdP_swapAB: bool = False,
    dKV_swapAB: bool = False,
    dQ_swapAB: bool = False,
    AtomLayoutMSdP: int = 2,
    AtomLayoutNdKV: int = 2,
    AtomLayoutMdQ: int = 2,
    V_in_regs: bool = False,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    deterministic: bool = False,
    dq: Tensor | None = None,
    dk: Tensor | None = None,
    dv: Tensor | None = None,
    score_mod: Callable | None = None,
    score_mod_bwd: Callable | None = None,
    mask_mod: Callable | None = None,
    aux_tensors: list[Tensor] | None = None,
    aux_scalars: tuple | None = None,
    block_sparse_tensors: BlockSparseTensorsTorch | None = None,
    dlse: Tensor | None = None,
    learnable_sink: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """The backward alone: -> dq, dk, dv, and with learnable_sink dsink. Writes dq, dk, dv where given.

    block_sparse_tensors lists, for every block of keys, blocks of rows, as in FlashAttention-4. Tensors that score_mod
    reads get no gradient here: flash_attn_func gives it.
    """
    check_tensors(q=q, k=k, v=v, out=out, dout=dout, lse=lse)
    functions = _Functions(score_mod, score_mod_bwd, mask_mod, aux_tensors, aux_scalars, block_sparse_tensors)
    window_size = (window_size_left, window_size_right)
    scores = _scores(softmax_scale, causal, window_size, softcap, learnable_sink, functions)
    sequences = _sequences(q, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q, seqused_k, None)
    dq, dk, dv = (torch.empty_like(x) if given is None else given for x, given in ((q, dq), (k, dk), (v, dv)))
    dsink = None if learnable_sink is None else torch.empty_like(learnable_sink, dtype=torch.float32)
    if _change_scores(functions):
        call = _call(q, k, v, sequences, scores, functions, deterministic, by_keys=True)
        call = _modified.prepared(call, q, k, v, True)
        _modified.backward(call, dout, q, k, v, out, lse, dq, dk, dv, dlse, dsink)
    else:
        run = Run(current(), None, bool(deterministic))
        _run.backward(dout, q, k, v, out, lse, dq, dk, dv, dlse, None, dsink, sequences, scores, None, run)
    return (dq, dk, dv) if dsink is None else (dq, dk, dv, dsink.to(learnable_sink.dtype))


def get_scheduler_metadata(
    max_seqlen_q: int,
    max_seqlen_k: int,
    nheads: int,
    nheads_kv: int,
    headdim: int,
    num_splits: int,
    headdim_v: int | None = None,
    pack_gqa: int | None = None,
    causal: bool = False,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    seqlen_k_new: int = 0,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    seqlen_k_per_split: int | None = None,
    _arch: int | None = None,
) -> SchedulerMetadataTensorsTorch:
    """What flash_attn_varlen_func takes as scheduler_metadata: empty, since work is dealt out by shape here."""
    return SchedulerMetadataTensorsTorch()
