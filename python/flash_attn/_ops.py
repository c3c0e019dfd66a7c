"""The torch.library operators flash_attn::_flash_attn_{,varlen_}{forward,backward}, for every device.

Their schemas are upstream's; what the forward can do beyond them comes last. The gradients of our functions have an
operator of their own, flash_attn::_flash_attn_gradients. Eager calls on plain tensors go straight to the compiled core,
calls that somebody traces (torch.compile, export, fake tensors) go through the dispatcher.
"""

from __future__ import annotations

import numbers

import torch
from torch import Tensor
from torch.autograd import forward_ad

from flash_attn import _C
from flash_attn._options import options
from flash_attn._s_dmask import empty_s_dmask, round_multiple, s_dmask, sequence_of_rows

_PLAIN_TYPES = (torch.Tensor, torch.nn.Parameter)
_is_compiling = torch.compiler.is_compiling
_dispatch_modes = torch._C._len_torch_dispatch_stack
_functorch_active = torch._C._are_functorch_transforms_active
_tracing_state = torch._C._get_tracing_state


def is_plain(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether these are ordinary tensors with memory, and nobody watches what is done with them."""
    return (
        not _is_compiling()
        and type(q) in _PLAIN_TYPES
        and type(k) in _PLAIN_TYPES
        and type(v) in _PLAIN_TYPES
        and not q.is_meta
        and not _dispatch_modes()
        and not _functorch_active()
        and _tracing_state() is None
        and forward_ad._current_level < 0
    )


def check_tensors(**tensors) -> None:
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")


def empty_out(q: Tensor, v: Tensor) -> Tensor:
    """Memory for out, (..., nheads, headdim_v). Malformed ranks get some memory too: the core says what is wrong."""
    if v.dim() == 0 or q.dim() == 0 or v.shape[-1] == q.shape[-1]:
        return torch.empty_like(q)
    return q.new_empty((*q.shape[:-1], v.shape[-1]))


def empty_lse(q: Tensor) -> Tensor:
    """Memory for softmax_lse: (batch, nheads, seqlen_q), or (nheads, total_q) of packed sequences."""
    if q.dim() == 4:
        return torch.empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32, device=q.device)
    return torch.empty((q.shape[1], q.shape[0]) if q.dim() == 3 else (0,), dtype=torch.float32, device=q.device)


def default_scale(q: Tensor) -> float:
    return q.shape[-1] ** -0.5 if q.dim() and q.shape[-1] else 1.0


def window(window_size) -> tuple:
    """-> left, right."""
    try:
        left, right = window_size
    except (TypeError, ValueError):
        raise ValueError(f"window_size: expected two integers (left, right), got {window_size!r}") from None
    return left, right


def draw_rng_state(q: Tensor) -> Tensor:
    """(seed, offset) of a dropout mask, from torch's generator of the device: torch.manual_seed repeats it."""
    return torch.randint(2**63 - 1, (2,), dtype=torch.int64, device=q.device)


def _seed_and_offset(dropout_p: float, rng_state: Tensor | None) -> tuple[int, int]:
    if dropout_p == 0.0:
        return 0, 0
    if rng_state is None:
        raise ValueError("rng_state: expected the forward's (seed, offset) where dropout_p > 0, got None")
    seed, offset = rng_state.tolist()
    return seed, offset


def _run_forward(q, k, v, dropout_p, return_softmax, scores, sequences, rng_state=None):
    """-> out, softmax_lse, S_dmask, rng_state."""
    if not isinstance(dropout_p, numbers.Real):
        raise TypeError(f"dropout_p: expected a number, got {type(dropout_p).__name__}")
    dropout_p = float(dropout_p)
    if rng_state is None:
        rng_state = draw_rng_state(q) if dropout_p > 0 else torch.zeros((2,), dtype=torch.int64, device=q.device)
    else:
        rng_state = rng_state.clone()
    seed, offset = _seed_and_offset(dropout_p, rng_state)
    out, lse = empty_out(q, v), empty_lse(q)
    _C.forward(q, k, v, out, lse, options(*scores, *sequences, dropout_p, seed, offset))
    if return_softmax and dropout_p > 0:
        return out, lse, s_dmask(q, k, scores, sequences, (dropout_p, seed, offset)), rng_state
    return out, lse, q.new_empty((0,)), rng_state


def _run_backward(tensors, scores, sequences, dropout_p, rng_state, deterministic, backend=None) -> None:
    """`tensors`: dout, q, k, v, out, softmax_lse, dq, dk, dv, dlse, dbias, dsink."""
    seed, offset = _seed_and_offset(dropout_p, rng_state)
    _C.backward(*tensors, options(*scores, *sequences, dropout_p, seed, offset, backend, deterministic))


def _fake_forward(q, v, dropout_p, return_softmax, batch, max_seqlen_q, max_seqlen_k):
    with_mask = return_softmax and dropout_p > 0
    mask = empty_s_dmask(q, batch, q.shape[-2], max_seqlen_q, max_seqlen_k) if with_mask else q.new_empty((0,))
    return empty_out(q, v), empty_lse(q), mask, torch.empty((2,), dtype=torch.int64, device=q.device)


# rng_state: of the mask, instead of one that the operator draws. In a traced graph the draw is then an operator that
# compilers know as random: two calls are not merged into one, and recomputing one repeats its mask.
_FORWARD_TAIL = (
    "Tensor? attn_bias=None, Tensor? learnable_sink=None, Tensor? rng_state=None) -> (Tensor, Tensor, Tensor, Tensor)"
)


@torch.library.custom_op(
    "flash_attn::_flash_attn_forward",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, float dropout_p, float softmax_scale, bool causal, SymInt window_size_left, "
    f"SymInt window_size_right, float softcap, Tensor? alibi_slopes, bool return_softmax, {_FORWARD_TAIL}",
)
def _forward_op(
    q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes,
    return_softmax, attn_bias=None, learnable_sink=None, rng_state=None,
):  # fmt: skip
    window = (window_size_left, window_size_right)
    scores = (softmax_scale, causal, *window, softcap, alibi_slopes, attn_bias, learnable_sink)
    return _run_forward(q, k, v, dropout_p, return_softmax, scores, (None,) * 7, rng_state)


@_forward_op.register_fake
def _(
    q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes,
    return_softmax, attn_bias=None, learnable_sink=None, rng_state=None,
):  # fmt: skip
    return _fake_forward(q, v, dropout_p, return_softmax, q.shape[0], q.shape[1], k.shape[1])


@torch.library.custom_op(
    "flash_attn::_flash_attn_varlen_forward",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, "
    "SymInt max_seqlen_k, float dropout_p, float softmax_scale, bool causal, SymInt window_size_left=-1, "
    "SymInt window_size_right=-1, float softcap=0.0, Tensor? alibi_slopes=None, bool return_softmax=False, "
    "Tensor? block_table=None, Tensor? leftpad_k=None, Tensor? seqused_k=None, bool zero_tensors=False, "
    f"SymInt num_splits=0, {_FORWARD_TAIL}",
)
def _varlen_forward_op(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
    window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False, block_table=None,
    leftpad_k=None, seqused_k=None, zero_tensors=False, num_splits=0, attn_bias=None, learnable_sink=None,
    rng_state=None,
):  # fmt: skip
    # zero_tensors and num_splits say how to compute, not what: rows of no sequence are always zero here.
    window = (window_size_left, window_size_right)
    scores = (softmax_scale, causal, *window, softcap, alibi_slopes, attn_bias, learnable_sink)
    sequences = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_k, leftpad_k, block_table)
    return _run_forward(q, k, v, dropout_p, return_softmax, scores, sequences, rng_state)


@_varlen_forward_op.register_fake
def _(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
    window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False, block_table=None,
    leftpad_k=None, seqused_k=None, zero_tensors=False, num_splits=0, attn_bias=None, learnable_sink=None,
    rng_state=None,
):  # fmt: skip
    return _fake_forward(q, v, dropout_p, return_softmax, cu_seqlens_q.numel() - 1, max_seqlen_q, max_seqlen_k)


def _softmax_d(dout: Tensor, out: Tensor) -> Tensor:
    """rowsum(dout * out), fp32, (batch, nheads, seqlen_q rounded up to 128): what the backward operators return."""
    d = (dout.float() * out.float()).sum(-1).transpose(1, 2)
    return torch.nn.functional.pad(d, (0, round_multiple(d.shape[-1], 128) - d.shape[-1]))


def _varlen_softmax_d(dout: Tensor, out: Tensor, cu_seqlens_q: Tensor) -> Tensor:
    """The same, (nheads, total_q + 128 * batch): row t of sequence b stands at t + 128 * b."""
    d = (dout.float() * out.float()).sum(-1).transpose(0, 1)
    rows, sequence = sequence_of_rows(cu_seqlens_q, d.shape[1])
    padded = d.new_zeros((d.shape[0], d.shape[1] + 128 * (cu_seqlens_q.numel() - 1)))
    return padded.index_copy_(1, rows + 128 * sequence, d)


@torch.library.custom_op(
    "flash_attn::_flash_attn_backward",
    mutates_args=("dq", "dk", "dv"),
    schema="(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, Tensor(a!) dq, Tensor(b!) dk, "
    "Tensor(c!) dv, float dropout_p, float softmax_scale, bool causal, SymInt window_size_left, "
    "SymInt window_size_right, float softcap, Tensor? alibi_slopes, bool deterministic, Tensor? rng_state=None) "
    "-> Tensor",
)
def _backward_op(
    dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size_left, window_size_right,
    softcap, alibi_slopes, deterministic, rng_state=None,
):  # fmt: skip
    scores = (softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, None, None)
    tensors = (dout, q, k, v, out, softmax_lse, dq, dk, dv, None, None, None)
    _run_backward(tensors, scores, (None,) * 7, dropout_p, rng_state, deterministic)
    return _softmax_d(dout, out)


@_backward_op.register_fake
def _(dout, q, *_, rng_state=None):
    batch, seqlen_q, nheads = q.shape[:3]
    return q.new_empty((batch, nheads, round_multiple(seqlen_q, 128)), dtype=torch.float32)


@torch.library.custom_op(
    "flash_attn::_flash_attn_varlen_backward",
    mutates_args=("dq", "dk", "dv"),
    schema="(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, Tensor(a!) dq, Tensor(b!) dk, "
    "Tensor(c!) dv, Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, "
    "float dropout_p, float softmax_scale, bool causal, SymInt window_size_left, SymInt window_size_right, "
    "float softcap, Tensor? alibi_slopes, bool deterministic, Tensor? rng_state=None, bool zero_tensors=False) "
    "-> Tensor",
)
def _varlen_backward_op(
    dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
    softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic, rng_state=None,
    zero_tensors=False,
):  # fmt: skip
    scores = (softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, None, None)
    sequences = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, None, None, None)
    tensors = (dout, q, k, v, out, softmax_lse, dq, dk, dv, None, None, None)
    _run_backward(tensors, scores, sequences, dropout_p, rng_state, deterministic)
    return _varlen_softmax_d(dout, out, cu_seqlens_q)


@_varlen_backward_op.register_fake
def _(dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, *_, rng_state=None, zero_tensors=False):
    total_q, nheads = q.shape[:2]
    return q.new_empty((nheads, total_q + 128 * (cu_seqlens_q.numel() - 1)), dtype=torch.float32)


# What is written has no default: arguments that are theirs never arrive, and torch (2.11) asks for all it writes.
@torch.library.custom_op(
    "flash_attn::_flash_attn_gradients",
    mutates_args=("dq", "dk", "dv", "dbias", "dsink"),
    schema="(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, Tensor(a!) dq, Tensor(b!) dk, "
    "Tensor(c!) dv, Tensor? dlse, Tensor(d!)? dbias, Tensor(e!)? dsink, float softmax_scale, bool causal, "
    "SymInt window_size_left, SymInt window_size_right, float softcap, Tensor? alibi_slopes, Tensor? attn_bias, "
    "Tensor? learnable_sink, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, SymInt? max_seqlen_q, SymInt? max_seqlen_k, "
    "float dropout_p, Tensor? rng_state, bool deterministic) -> ()",
)
def _gradients_op(*arguments):
    tensors, scores, sequences = arguments[:12], arguments[12:20], arguments[20:24]
    _run_backward(tensors, scores, (*sequences, None, None, None), *arguments[24:])


@_gradients_op.register_fake
def _(*_):
    return None
