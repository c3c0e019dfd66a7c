"""Attention with what a caller makes of scores: score_mod, mask_mod, lists of blocks.

The core checks the call as any other; the functions travel beside the Problem, as Tensors.mods. On a GPU the `triton`
backend runs those that it can trace into its kernels; the `torch` backend runs all, on every device.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch
from torch import Tensor

from flash_attn import _C, _engines, _run
from flash_attn._attention import check_constants
from flash_attn._backend import current
from flash_attn._call import Run, Scores, Sequences
from flash_attn._engines.torch.mods import VALUES, Mods, tensors_read
from flash_attn._errors import NotServed
from flash_attn._refusal import refuse_gradient
from flash_attn._tensors import empty_gradients, empty_lse, empty_out, is_plain

BACKEND = "torch"
KERNELS = "triton"
WORDS = "score_mod, mask_mod and block_sparse_tensors"


def _named() -> str | None:
    return current() or os.environ.get("FLASH_ATTENTION_BACKEND") or None


def refuse_other_backends() -> None:
    named = _named()
    if named not in (None, BACKEND, KERNELS):
        raise NotServed(
            f"{WORDS}: run on the backend {BACKEND}, on every device, and on {KERNELS}; {named} was asked for by name"
        )


def no_kernels(q: Tensor) -> str:
    """Why no Triton kernel takes functions of scores on q's device; empty if some may."""
    if _named() == BACKEND:
        return f"{BACKEND} was asked for by name"
    if not (q.is_cuda or q.is_xpu or os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")):
        return f"q: it runs on GPUs, got {q.device.type}"
    engine = _engines.get(KERNELS)
    if engine is None:
        return "it is not available"
    is_nvidia = q.is_cuda and torch.version.hip is None
    asked = SimpleNamespace(dtype=str(q.dtype)[6:], device_type=2 if is_nvidia else 0, device_index=q.get_device())
    return engine.refuses(asked)


def explained(candidates: list, plan: str, q: Tensor) -> tuple[list, str]:
    """For flash_attn.explain, which calls no function: -> the candidates, of which `torch` was named, and the plan."""
    why_not = no_kernels(q)
    found = []
    for c in candidates:
        if c.backend == KERNELS:
            c = c._replace(chosen=not why_not, why_not=why_not)
        elif c.backend == BACKEND:
            c = c._replace(chosen=bool(why_not))
        else:
            c = c._replace(chosen=False, why_not=c.why_not or f"{WORDS}: run on the backends {KERNELS} and {BACKEND}")
        found.append(c)
    words = f"functions traced into Triton kernels; on the backend {BACKEND} if one cannot be"
    return found, plan if why_not else words


@dataclass(frozen=True)
class Call:
    """All of a call but its differentiable tensors."""

    sequences: Sequences
    scores: Scores  # with the sink
    mods: Mods
    deterministic: bool = False
    lowered: object = None  # what the `triton` engine has made of mods, and runs

    @property
    def run(self) -> Run:
        return Run(BACKEND, None, self.deterministic, positive_empty_lse=False)


def check(q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, scores: Scores) -> None:
    """All that the core checks of a call, before lists of blocks are read and functions called."""
    if not is_plain(q, k, v):
        raise NotServed(f"{WORDS}: run eagerly, on plain tensors; they are traced or transformed by nobody")
    refuse_other_backends()
    check_constants(scores)
    run = Run(BACKEND, positive_empty_lse=False)  # of Python: the core hands the call back, and runs nothing
    _C.forward(q, k, v, empty_out(q, v), empty_lse(q), sequences, scores, None, run, None, None, None, False)


def _with_reads(call: Call, q: Tensor) -> Call:
    """For the torch engine, which must know what score_mod reads."""
    mods = call.mods
    if mods.score_mod is None:
        return call
    reads = (x for x in tensors_read("score_mod", mods.score_mod, q.device) if x.is_floating_point())
    reads = tuple(x for x in reads if x.requires_grad or torch.finfo(x.dtype).bits <= 16)
    wanted = any(x.requires_grad for x in reads) and torch.is_grad_enabled()
    if wanted and mods.score_mod_bwd is not None:
        raise NotServed(
            "score_mod_bwd: gives no gradient of the tensors that score_mod reads; leave it out, and autograd does, or "
            "detach them"
        )
    return replace(call, mods=replace(mods, reads=reads, dreads=(None,) * len(reads)))


def prepared(call: Call, q: Tensor, k: Tensor, v: Tensor, gradient: bool) -> Call:
    """With its functions in Triton kernels, if they can be there; else for the torch engine. `gradient`: a backward of
    q, k or v will follow."""
    if not (q.numel() and k.numel()):
        return call
    why_not = no_kernels(q)
    if not why_not:
        from flash_attn._engines.triton.modified import Untraceable, lower

        try:
            return replace(call, lowered=lower(call.mods, q, v, gradient))
        except Untraceable as e:
            why_not = str(e)
    if _named() == KERNELS:
        raise NotServed(f"{WORDS}: the backend {KERNELS} was asked for by name, and cannot: {why_not}")
    return _with_reads(call, q)


def _of_heads(x: Tensor | None, heads: slice) -> Tensor | None:
    """Operands (..., heads, cols)"""
    return None if x is None else x[..., heads, :]


def _parts(call: Call, q: Tensor, k: Tensor) -> Iterator[tuple[Call, slice, slice]]:
    """The call, or where heads have lists of blocks of their own, a call for each head of keys: a part computes what
    one of its heads lists. -> call, heads of q, heads of k."""
    nheads, nheads_k = q.shape[-2], k.shape[-2]
    blocks = call.mods.blocks
    if blocks is None or blocks.kinds.shape[1] == 1:
        yield call, slice(None), slice(None)
        return
    group, sink = nheads // nheads_k, call.scores.learnable_sink
    for h in range(nheads_k):
        heads = slice(h * group, (h + 1) * group)
        mods = replace(call.mods, blocks=replace(blocks, kinds=blocks.kinds[:, heads]), first_head=heads.start)
        scores = call.scores if sink is None else call.scores._replace(learnable_sink=sink[heads])
        yield replace(call, mods=mods, scores=scores), heads, slice(h, h + 1)


def forward(call: Call, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor | None) -> None:
    """Writes out and lse."""
    if call.lowered is not None:
        _run.forward(q, k, v, out, lse, call.sequences, call.scores, None, call.run, mods=call.lowered)
        return
    for part, heads, heads_k in _parts(call, q, k):
        _run.forward(
            _of_heads(q, heads), _of_heads(k, heads_k), _of_heads(v, heads_k), _of_heads(out, heads),
            None if lse is None else lse[..., heads, :], part.sequences, part.scores, None, part.run, mods=part.mods,
        )  # fmt: skip


def backward(call: Call, dout, q, k, v, out, lse, dq, dk, dv, dlse, dsink) -> None:
    """Writes dq, dk, dv, and dsink unless it is None; adds to call.mods.dreads."""
    if call.lowered is not None:
        groups = (call.sequences, call.scores, None, call.run)
        _run.backward(dout, q, k, v, out, lse, dq, dk, dv, dlse, None, dsink, *groups, mods=call.lowered)
        return
    for part, heads, heads_k in _parts(call, q, k):
        _run.backward(
            *(_of_heads(x, heads) for x in (dout, q)), *(_of_heads(x, heads_k) for x in (k, v)), _of_heads(out, heads),
            lse[..., heads, :], _of_heads(dq, heads), *(_of_heads(x, heads_k) for x in (dk, dv)),
            None if dlse is None else dlse[..., heads, :], None, None if dsink is None else dsink[heads],
            part.sequences, part.scores, None, part.run, mods=part.mods,
        )  # fmt: skip


def _constants(call: Call, q: Tensor, k: Tensor) -> list[Tensor]:
    """What a backward reads again and has no gradient: autograd, which saves it, sees when it has been written to."""
    constants = [x for x in call.sequences if isinstance(x, Tensor)]
    if call.lowered is not None:
        constants += (x for x in call.lowered.tables if not x.requires_grad)
        return [x for x in constants if not x.is_inference()]
    blocks = call.mods.blocks
    for name in VALUES if q.numel() and k.numel() else ():
        is_asked = name != "mask_mod" or blocks is None or bool((blocks.kinds == blocks.PARTIAL).any())
        if is_asked and (function := getattr(call.mods, name)) is not None:
            constants += (x for x in tensors_read(name, function, q.device) if not x.requires_grad)
    return [x for x in constants if not x.is_inference()]


class _Modified(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call: Call, q, k, v, sink, *reads):
        out, lse = empty_out(q, v), empty_lse(q)
        forward(call, q, k, v, out, lse)
        ctx.save_for_backward(q, k, v, out, lse, sink, *reads, *_constants(call, q, k))
        ctx.call = call
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        q, k, v, out, lse, sink, *reads = ctx.saved_tensors
        del reads[len(ctx.call.mods.reads) :]
        if ctx.call.sequences.block_table is not None:
            raise NotServed("page_table: pages of keys and values are not differentiable")
        dout = torch.zeros_like(out) if dout is None else dout
        results, gradients = empty_gradients(q, k, v, 0)
        dsink = torch.empty_like(sink, dtype=torch.float32) if ctx.needs_input_grad[4] else None
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        sums = [
            torch.zeros_like(x, dtype=torch.promote_types(x.dtype, wide)) if wanted else None
            for x, wanted in zip(reads, ctx.needs_input_grad[5:], strict=True)
        ]
        call = replace(ctx.call, mods=replace(ctx.call.mods, dreads=tuple(sums)))
        backward(call, dout, q, k, v, out, lse, *gradients, dlse, dsink)
        results = [*results, None if dsink is None else dsink.to(sink.dtype)]
        for total, x in zip(sums, reads, strict=True):
            results.append(None if total is None else total.to(x.dtype))
        if torch.is_grad_enabled():  # create_graph=True
            words = "second derivatives of attention are not served"
            wanted = [x for x in results if x is not None]
            wanted = iter(refuse_gradient(words, wanted, (dout, dlse, q, k, v, sink, *reads)))
            results = [None if x is None else next(wanted) for x in results]
        return None, *results


def attention(call: Call, q: Tensor, k: Tensor, v: Tensor, wants_lse: bool) -> tuple[Tensor, Tensor | None]:
    """-> out, lse (None unless it is wanted, or a gradient is). The call has passed check()."""
    sink = call.scores.learnable_sink

    def wanted(*tensors) -> bool:
        return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)

    call = prepared(call, q, k, v, wanted(q, k, v, sink))
    reads = call.mods.reads
    if wanted(q, k, v, sink, *reads):
        return _Modified.apply(call, q, k, v, sink, *reads)
    out, lse = empty_out(q, v), empty_lse(q) if wants_lse else None
    forward(call, q, k, v, out, lse)
    return out, lse
