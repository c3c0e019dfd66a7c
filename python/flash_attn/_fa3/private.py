"""_flash_attn_forward and _flash_attn_backward, that other packages import."""

from __future__ import annotations

import torch
from torch import Tensor

from flash_attn._call import Scores, Sequences
from flash_attn._errors import InvalidArgument
from flash_attn._fa3.attend import attend, attend_cache, check_hints
from flash_attn._fa3.fp8 import Descales
from flash_attn._kvcache import joining


def no_partials(out: Tensor) -> tuple[Tensor, Tensor]:
    """out_accum and softmax_lse_accum: upstream's results of each split, which nobody here leaves behind."""
    return out.new_empty((0,), dtype=torch.float32), out.new_empty((0,), dtype=torch.float32)


def write_out(memory: Tensor | None, out: Tensor) -> Tensor:
    """`out`, in the memory that a caller gave."""
    if memory is None:
        return out
    if memory.shape != out.shape or memory.dtype != out.dtype:
        raise InvalidArgument(
            f"out: expected {out.dtype} of shape {tuple(out.shape)}, got {memory.dtype} of {tuple(memory.shape)}"
        )
    return memory.copy_(out)


def _flash_attn_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_new: Tensor | None = None,
    v_new: Tensor | None = None,
    qv: Tensor | None = None,
    out_: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    page_table: Tensor | None = None,
    kv_batch_idx: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    seqlens_rotary: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size_left: int = -1,
    window_size_right: int = -1,
    attention_chunk: int = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: Tensor | None = None,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> out, softmax_lse, and two empty tensors (upstream's partial results).

    Differentiable where q, k, v are all of fixed length, or all packed, and there is no cache: no pages, new keys,
    entries or padding. New keys join k and v, in place.
    """
    check_hints(num_splits, pack_gqa, sm_margin, scheduler_metadata)
    scores = Scores(
        softmax_scale, causal, window_size_left, window_size_right, softcap, attention_chunk=attention_chunk
    )
    sequences = Sequences(
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q, seqused_k, None, leftpad_k, kv_batch_idx,
        page_table,
    )  # fmt: skip
    new = (k_new, v_new, cu_seqlens_k_new, rotary_cos, rotary_sin)
    return forward(q, k, v, qv, out_, sequences, scores, new, rotary_interleaved, seqlens_rotary,
                   Descales(q_descale, k_descale, v_descale))  # fmt: skip


def forward(q, k, v, qv, memory, sequences, scores, new, interleaved, positions, descales, in_operator=False):
    """`new`: k, v, cu_seqlens, and rotary cos and sin of new keys. -> what _flash_attn_forward returns."""
    if memory is not None and torch.compiler.is_compiling():
        raise InvalidArgument("out_: memory for out cannot be given where the call is traced")
    packed = sequences.cu_seqlens_q is not None
    of_cache = (sequences.block_table, sequences.cache_batch_idx, sequences.leftpad_k, positions, *new)
    of_lengths = () if packed else (sequences.seqused_q, sequences.seqused_k, sequences.used_k)
    if packed == (sequences.cu_seqlens_k is not None) and not any(x is not None for x in (*of_cache, *of_lengths)):
        name = "_flash_attn_forward"
        out, lse = attend(q, k, v, qv, descales, sequences, scores, 0.0, False, True, name, in_operator)
    else:
        groups = joining(*new, interleaved, positions)
        out, lse = attend_cache(q, k, v, qv, descales, sequences, scores, *groups, True, in_operator)
    return write_out(memory, out), lse, *no_partials(out)


def _flash_attn_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    sequed_q: Tensor | None = None,
    sequed_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    dq: Tensor | None = None,
    dk: Tensor | None = None,
    dv: Tensor | None = None,
    softmax_scale: float | None = None,
    is_causal: bool = False,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    deterministic: bool = False,
    sm_margin: int = 0,
) -> Tensor:
    """Writes dq, dk, dv, which must be given; -> softmax_d, fp32 (batch, nheads, seqlen_q rounded up to 128), or
    (nheads, total_q + 128 * batch) of packed sequences."""
    check_hints(sm_margin=sm_margin)
    softmax_d, *_ = torch.ops.flash_attn_3.bwd(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, sequed_q, sequed_k, max_seqlen_q,
        max_seqlen_k, softmax_scale, is_causal, window_size_left, window_size_right, softcap, deterministic, sm_margin,
    )  # fmt: skip
    return softmax_d
