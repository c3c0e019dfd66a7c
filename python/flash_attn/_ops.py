"""The torch.library operators flash_attn::_flash_attn_*, for every device.

The forwards and backwards have upstream's schemas; what ours can do beyond them comes last. The gradients of our own
functions have an operator that returns them, flash_attn::_flash_attn_gradients: a compiler need not know about writes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flash_attn import _attention, _run
from flash_attn._backend import current
from flash_attn._call import FIXED, NO_DROPOUT, Dropout, Run, Scores, Sequences
from flash_attn._errors import InvalidArgument
from flash_attn._flops import backward_flops, forward_flops
from flash_attn._library import declare, define, pick
from flash_attn._s_dmask import empty_s_dmask, round_multiple, sequence_of_rows
from flash_attn._tensors import empty_extras, empty_gradients, empty_lse, empty_out

# ---- Forward ---------------------------------------------------------------------------------------------------------

_FORWARD = "Tensor q, Tensor k, Tensor v, "
_UPSTREAMS_SCORES = ("softmax_scale", "causal", "window_size_left", "window_size_right", "softcap", "alibi_slopes")
_UPSTREAMS_SEQUENCES = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "block_table", "leftpad_k",
                        "seqused_k")  # fmt: skip
# rng_state: of the mask, instead of one that the operator draws. In a traced graph the draw is then an operator that
# compilers know as random: two calls are not merged into one, and recomputing one repeats its mask.
_FORWARD_TAIL = (
    f"{declare(Scores, without=_UPSTREAMS_SCORES)}, Tensor? rng_state=None, bool positive_empty_lse=True) -> "
    "(Tensor, Tensor, Tensor, Tensor)"
)


def _sequences(call: dict) -> Sequences:
    """A negative length stands for None: upstream's schema wants an integer."""
    sequences = pick(Sequences, call) if "cu_seqlens_q" in call else FIXED
    for name in ("max_seqlen_q", "max_seqlen_k"):
        if (getattr(sequences, name) or 0) < 0:
            sequences = sequences._replace(**{name: None})
    return sequences


def _forward(call: dict):
    """-> out, softmax_lse, S_dmask, rng_state."""
    q, p = call["q"], call["dropout_p"]
    given = call["rng_state"]
    rng_state = given.clone() if given is not None else None  # results are no inputs
    run = Run(current(), positive_empty_lse=call["positive_empty_lse"])
    out, lse, S_dmask, rng_state, _ = _attention.forward(
        q, call["k"], call["v"], _sequences(call), pick(Scores, call), p, run, True, call["return_softmax"], rng_state
    )
    if rng_state is None:  # zeros are a kernel on a device: there nobody reads them, as upstream's are not set either
        make = torch.zeros if q.device.type == "cpu" else torch.empty
        rng_state = make((2,), dtype=torch.int64, device=q.device)
    return out, lse, q.new_empty((0,)) if S_dmask is None else S_dmask, rng_state


def fake_forward(call: dict):
    q, k = call["q"], call["k"]
    if call["return_softmax"] and call["dropout_p"] > 0:
        if "cu_seqlens_q" in call:
            seqlens = call["max_seqlen_q"], call["max_seqlen_k"]
            if min(seqlens) < 0:
                raise InvalidArgument("max_seqlen_q, max_seqlen_k: required where S_dmask is traced")
            mask = empty_s_dmask(q, call["cu_seqlens_q"].numel() - 1, q.shape[-2], *seqlens)
        else:
            mask = empty_s_dmask(q, q.shape[0], q.shape[-2], q.shape[1], k.shape[1])
    else:
        mask = q.new_empty((0,))
    return empty_out(q, call["v"]), empty_lse(q), mask, torch.empty((2,), dtype=torch.int64, device=q.device)


define(
    f"_flash_attn_forward({_FORWARD}float dropout_p, float softmax_scale, bool causal, SymInt window_size_left, "
    f"SymInt window_size_right, float softcap, Tensor? alibi_slopes, bool return_softmax, {_FORWARD_TAIL}",
    _forward,
    fake_forward,
    forward_flops,
)
# zero_tensors and num_splits say how to compute, not what: rows of no sequence are always zero here.
define(
    f"_flash_attn_varlen_forward({_FORWARD}Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, "
    "SymInt max_seqlen_k, float dropout_p, float softmax_scale, bool causal, SymInt window_size_left=-1, "
    "SymInt window_size_right=-1, float softcap=0.0, Tensor? alibi_slopes=None, bool return_softmax=False, "
    "Tensor? block_table=None, Tensor? leftpad_k=None, Tensor? seqused_k=None, bool zero_tensors=False, "
    f"SymInt num_splits=0, {declare(Sequences, without=_UPSTREAMS_SEQUENCES)}, {_FORWARD_TAIL}",
    _forward,
    fake_forward,
    forward_flops,
)

# ---- Backward --------------------------------------------------------------------------------------------------------


def _fixed_softmax_d(dout: Tensor, out: Tensor) -> Tensor:
    """sum(dout * out) per row, (batch, nheads, seqlen_q rounded up to 128): the fourth result of upstream's."""
    d = (dout.float() * out.float()).sum(-1).transpose(1, 2)
    return torch.nn.functional.pad(d, (0, round_multiple(d.shape[-1], 128) - d.shape[-1]))


def softmax_d(dout: Tensor, out: Tensor, cu_seqlens_q: Tensor | None) -> Tensor:
    return _fixed_softmax_d(dout, out) if cu_seqlens_q is None else _varlen_softmax_d(dout, out, cu_seqlens_q)


def _varlen_softmax_d(dout: Tensor, out: Tensor, cu_seqlens_q: Tensor) -> Tensor:
    """The same, (nheads, total_q + 128 * batch): row t of sequence b stands at t + 128 * b."""
    d = (dout.float() * out.float()).sum(-1).transpose(0, 1)
    rows, sequence = sequence_of_rows(cu_seqlens_q, d.shape[1])
    padded = d.new_zeros((d.shape[0], d.shape[1] + 128 * (cu_seqlens_q.numel() - 1)))
    return padded.index_copy_(1, rows + 128 * sequence, d)


def dropout_of(p: float, rng_state: Tensor | None) -> Dropout:
    if p == 0.0:
        return NO_DROPOUT
    if rng_state is None:
        raise InvalidArgument("rng_state: expected the forward's (seed, offset) where dropout_p > 0, got None")
    return Dropout(p, rng_state)


def _backward(call: dict) -> Tensor:
    """Writes dq, dk, dv; -> softmax_d."""
    dout, out = call["dout"], call["out"]
    _run.backward(
        dout, *(call[n] for n in ("q", "k", "v")), out, *(call[n] for n in ("softmax_lse", "dq", "dk", "dv")), None,
        None, None, _sequences(call), pick(Scores, call), dropout_of(call["dropout_p"], call["rng_state"]),
        Run(current(), None, call["deterministic"]),
    )  # fmt: skip
    return softmax_d(dout, out, call.get("cu_seqlens_q"))


def fake_softmax_d(call: dict) -> Tensor:
    q = call["q"]
    if "cu_seqlens_q" in call:
        shape = (q.shape[1], q.shape[0] + 128 * (call["cu_seqlens_q"].numel() - 1))
    else:
        shape = (q.shape[0], q.shape[2], round_multiple(q.shape[1], 128))
    return q.new_empty(shape, dtype=torch.float32)


_BACKWARD = "Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, "
_WRITTEN = "Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv, "
_BACKWARD_SCORES = (
    "float dropout_p, float softmax_scale, bool causal, SymInt window_size_left, SymInt window_size_right, "
    "float softcap, Tensor? alibi_slopes, bool deterministic, Tensor? rng_state=None"
)
define(
    f"_flash_attn_backward({_BACKWARD}{_WRITTEN}{_BACKWARD_SCORES}) -> Tensor",
    _backward,
    fake_softmax_d,
    backward_flops,
)
define(
    f"_flash_attn_varlen_backward({_BACKWARD}{_WRITTEN}Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, "
    f"SymInt max_seqlen_k, {_BACKWARD_SCORES}, bool zero_tensors=False) -> Tensor",
    _backward,
    fake_softmax_d,
    backward_flops,
)


def _gradients(call: dict) -> list[Tensor]:
    return _attention.gradients(
        *(call[n] for n in ("dout", "q", "k", "v", "out", "softmax_lse", "dlse", "packing")), _sequences(call),
        pick(Scores, call), pick(Dropout, call), Run(current(), None, call["deterministic"]), call["wants_dsink"],
        call["wants_dbias"],
    )  # fmt: skip


def _fake_gradients(call: dict) -> list[Tensor]:
    scores = pick(Scores, call)
    results, _ = empty_gradients(call["q"], call["k"], call["v"], call["packing"])
    extras = empty_extras(scores, call["wants_dsink"], call["wants_dbias"])
    originals = (scores.learnable_sink, scores.attn_bias)
    return [*results, *(x.to(y.dtype) for x, y in zip(extras, originals, strict=True) if x is not None)]


define(
    f"_flash_attn_gradients({_BACKWARD}Tensor? dlse, int packing, {declare(Sequences, required=True)}, "
    f"{declare(Scores, required=True)}, {declare(Dropout, required=True)}, bool deterministic, bool wants_dsink, "
    "bool wants_dbias) -> Tensor[]",
    _gradients,
    _fake_gradients,
    backward_flops,
)
