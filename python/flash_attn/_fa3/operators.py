"""torch.ops.flash_attn_3.fwd, bwd, fwd_combine and get_scheduler_metadata: upstream's schemas, on every device.

Upstream's schema of fwd names what it writes to `out`, but not the caches that new keys join, and fwd_combine's names
nothing. Calls that write are refused where somebody traces. The functions of interface.py trace with caches that are
written to.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flash_attn import _ops, _run
from flash_attn._backend import current
from flash_attn._call import NO_DROPOUT, Run, Scores, Sequences
from flash_attn._errors import InvalidArgument, NotServed
from flash_attn._fa3 import private
from flash_attn._fa3.attend import check_hints
from flash_attn._fa3.combine import flash_attn_combine
from flash_attn._fa3.fp8 import FP8, Descales
from flash_attn._flops import backward_flops, cache_flops, forward_flops
from flash_attn._library import define, pick
from flash_attn._tensors import empty_lse

_LENGTHS = "SymInt? max_seqlen_q=None, SymInt? max_seqlen_k=None"
_MASK = "bool is_causal=False, SymInt window_size_left=-1, SymInt window_size_right=-1"
_HINTS = "SymInt num_splits=0, bool? pack_gqa=None, SymInt sm_margin=0"


def _groups(call: dict) -> tuple[Sequences, Scores]:
    scores = pick(Scores, {**call, "causal": call["is_causal"]})
    tables = {"block_table": call.get("page_table"), "cache_batch_idx": call.get("kv_batch_idx")}
    return pick(Sequences, {**call, **tables}), scores


def _forward(call: dict):
    check_hints(call["num_splits"], call["pack_gqa"], call["sm_margin"], call["scheduler_metadata"])
    sequences, scores = _groups(call)
    new = tuple(call[name] for name in ("k_new", "v_new", "cu_seqlens_k_new", "rotary_cos", "rotary_sin"))
    descales = Descales(call["q_descale"], call["k_descale"], call["v_descale"])
    inputs = (call[name] for name in ("q", "k", "v", "q_v", "out"))
    rotation = (call["is_rotary_interleaved"], call["seqlens_rotary"])
    return private.forward(*inputs, sequences, scores, new, *rotation, descales, in_operator=True)


def _fake_forward(call: dict):
    for name, words in (("out", "memory for results"), ("k_new", "keys that join a cache")):
        if call[name] is not None:
            raise NotServed(f"flash_attn_3::fwd: {name}: {words} cannot be traced; see flash_attn_with_kvcache")
    q = call["q"]
    out = q.new_empty((*q.shape[:-1], call["v"].shape[-1]), dtype=torch.bfloat16 if q.dtype == FP8 else q.dtype)
    return out, empty_lse(q), *private.no_partials(out)


def _forward_flops(call: dict) -> int:
    if call.get("cu_seqlens_k") is None:
        flops = cache_flops({**call, "k_cache": call["k"], "v_cache": call["v"], "block_table": call.get("page_table")})
    else:
        flops = forward_flops(call)
    headdim, headdim_v = call["q"].shape[-1], call["v"].shape[-1]
    of_qv = headdim_v if call.get("q_v") is not None else 0
    return flops * (headdim + headdim_v + of_qv) // max(headdim + headdim_v, 1)


_TABLES = (
    "Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, Tensor? cu_seqlens_k_new=None, Tensor? seqused_q=None, "
    f"Tensor? seqused_k=None, {_LENGTHS}, Tensor? page_table=None, Tensor? kv_batch_idx=None, Tensor? leftpad_k=None, "
    "Tensor? rotary_cos=None, Tensor? rotary_sin=None, Tensor? seqlens_rotary=None, Tensor? q_descale=None, "
    "Tensor? k_descale=None, Tensor? v_descale=None, float? softmax_scale=None"
)
_FORWARD_TAIL = (
    f"{_TABLES}, {_MASK}, SymInt attention_chunk=0, float softcap=0.0, bool is_rotary_interleaved=False, "
    f"Tensor? scheduler_metadata=None, {_HINTS}, Tensor? alibi_slopes=None, Tensor? learnable_sink=None, "
    "Tensor? attn_bias=None, SymInt? used_k=None"
)
# Compilers take no operator whose result is an argument, as upstream's says of `out`: graphs of ours hold the second.
for _schema in (
    "fwd(Tensor q, Tensor k, Tensor v, Tensor(k_new!)? k_new=None, Tensor(v_new!)? v_new=None, Tensor? q_v=None, "
    f"Tensor(out!)? out=None, {_FORWARD_TAIL}) -> (Tensor(out!), Tensor, Tensor, Tensor)",
    "_fwd(Tensor q, Tensor k, Tensor v, Tensor? k_new=None, Tensor? v_new=None, Tensor? q_v=None, Tensor? out=None, "
    f"{_FORWARD_TAIL}) -> (Tensor, Tensor, Tensor, Tensor)",
):
    define(_schema, _forward, _fake_forward, _forward_flops, "flash_attn_3")


# The same two under the names, and with the names of arguments, of upstream's Python functions.
_RENAMED = {"qv": "q_v", "out_": "out", "causal": "is_causal", "rotary_interleaved": "is_rotary_interleaved",
            "sequed_q": "seqused_q", "sequed_k": "seqused_k"}  # fmt: skip


def _renamed(function):
    return lambda call: function({_RENAMED.get(name, name): x for name, x in call.items()})


fake_forward = _renamed(_fake_forward)


define(
    "_flash_attn_forward(Tensor q, Tensor k, Tensor v, Tensor? k_new=None, Tensor? v_new=None, Tensor? qv=None, "
    f"Tensor? out_=None, {_TABLES}, {_MASK.replace('is_causal', 'causal')}, SymInt attention_chunk=0, "
    "float softcap=0.0, bool rotary_interleaved=True, Tensor? scheduler_metadata=None, "
    f"{_HINTS.replace('num_splits=0', 'num_splits=1')}) -> (Tensor, Tensor, Tensor, Tensor)",
    _renamed(_forward),
    fake_forward,
    _renamed(_forward_flops),
    "flash_attn_3",
)


def _backward(call: dict):
    """Writes dq, dk, dv; -> softmax_d, and four workspaces of upstream's that are empty here."""
    check_hints(sm_margin=call["sm_margin"])
    for name in ("dq", "dk", "dv"):
        if call[name] is None:
            raise InvalidArgument(f"{name}: required: the gradient is written there")
    sequences, scores = _groups(call)
    inputs = (call[name] for name in ("dout", "q", "k", "v", "out", "softmax_lse", "dq", "dk", "dv"))
    run = Run(current(), None, call["deterministic"])
    _run.backward(*inputs, None, None, None, sequences, scores, NO_DROPOUT, run)
    softmax_d = _ops.softmax_d(call["dout"], call["out"], call["cu_seqlens_q"])
    return softmax_d, *_workspaces(call["q"])


def _workspaces(q: Tensor) -> list[Tensor]:
    return [q.new_empty((0,), dtype=torch.float32) for _ in range(4)]


def _fake_backward(call: dict):
    given = {name: x for name, x in call.items() if name != "cu_seqlens_q" or x is not None}
    return _ops.fake_softmax_d(given), *_workspaces(call["q"])


define(
    "bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, Tensor(dq!)? dq=None, "
    "Tensor(dk!)? dk=None, Tensor(dv!)? dv=None, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, "
    f"Tensor? seqused_q=None, Tensor? seqused_k=None, {_LENGTHS}, float? softmax_scale=None, {_MASK}, "
    "float softcap=0.0, bool deterministic=False, SymInt sm_margin=0) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
    backward_flops,
    "flash_attn_3",
)


fake_backward = _renamed(lambda call: _fake_backward(call)[0])
define(
    "_flash_attn_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, "
    "Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, Tensor? sequed_q=None, Tensor? sequed_k=None, "
    f"{_LENGTHS}, Tensor(a!)? dq=None, Tensor(b!)? dk=None, Tensor(c!)? dv=None, float? softmax_scale=None, {_MASK}, "
    "float softcap=0.0, bool deterministic=False, SymInt sm_margin=0) -> Tensor",
    _renamed(lambda call: _backward(call)[0]),
    fake_backward,
    backward_flops,
    "flash_attn_3",
)


def _combine(call: dict):
    return flash_attn_combine(call["out_partial"], call["lse_partial"], call["out"], call["out_dtype"])


def _fake_combine(call: dict):
    if call["out"] is not None:
        raise NotServed("flash_attn_3::fwd_combine: out: memory for results cannot be traced; see flash_attn_combine")
    x = call["out_partial"]
    out = x.new_empty(x.shape[1:], dtype=x.dtype if call["out_dtype"] is None else call["out_dtype"])
    return out, x.new_empty(x.shape[1:-1], dtype=torch.float32)


define(
    "fwd_combine(Tensor out_partial, Tensor lse_partial, Tensor? out=None, ScalarType? out_dtype=None) -> "
    "(Tensor, Tensor)",
    _combine,
    _fake_combine,
    lambda call: 2 * call["out_partial"].numel(),
    "flash_attn_3",
)


def _scheduler_metadata(call: dict) -> Tensor:
    return torch.zeros((1,), dtype=torch.int32, device=call["seqused_k"].device)


define(
    "get_scheduler_metadata(SymInt batch_size, SymInt max_seqlen_q, SymInt max_seqlen_k, SymInt num_heads, "
    "SymInt num_heads_k, SymInt headdim, SymInt headdim_v, ScalarType qkv_dtype, Tensor seqused_k, "
    "Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, Tensor? cu_seqlens_k_new=None, Tensor? seqused_q=None, "
    f"Tensor? leftpad_k=None, SymInt? page_size=None, SymInt max_seqlen_k_new=0, {_MASK}, SymInt attention_chunk=0, "
    f"bool has_softcap=False, {_HINTS}) -> Tensor",
    _scheduler_metadata,
    _scheduler_metadata,
    lambda call: 0,
    "flash_attn_3",
)
