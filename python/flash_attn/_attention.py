"""The one path of the six functions: inputs and groups in, out (and softmax_lse, S_dmask) back.

Plain tensors go straight to the core. Where gradients are wanted, autograd keeps the groups in between; where somebody
traces (torch.compile, export, fake tensors, a dispatch mode), the operators of _ops.py stand in the graph.
"""

from __future__ import annotations

import numbers
from typing import NamedTuple, get_args, get_type_hints

import torch
from torch import Tensor
from torch.autograd.profiler import record_function

from flash_attn import _run
from flash_attn._backend import current, use_backend
from flash_attn._call import FIXED, NO_DROPOUT, Dropout, Run, Scores, Sequences, check_tensors
from flash_attn._errors import InvalidArgument, InvalidType, NotServed
from flash_attn._refusal import refuse_gradient
from flash_attn._s_dmask import s_dmask
from flash_attn._tensors import empty_extras, empty_gradients, empty_lse, empty_out, is_plain, unpacked

_grad_enabled = torch.is_grad_enabled
_profiler_enabled = torch.autograd._profiler_enabled
_ops = torch.ops.flash_attn
_AUTOMATIC = Run()

_NUMBER_TYPES = (bool, int, float, torch.SymInt, torch.SymFloat, torch.SymBool)

# Dynamo of torch 2.4 cannot look up `_fields`: what traced code needs of the groups stands here.
_SEQUENCES, _SCORES = Sequences._fields, Scores._fields
OF_SEQUENCES, OF_SCORES = (
    tuple(None if kind == Tensor | None else kind if isinstance(kind, type) else get_args(kind)[0] for kind in kinds)
    for kinds in (get_type_hints(Group).values() for Group in (Sequences, Scores))
)
_WANTED = tuple(_SCORES.index(name) for name in ("learnable_sink", "attn_bias"))  # that may have a gradient
_CONSTANTS = tuple(Scores._fields.index(name) for name in ("softmax_scale", "softcap", "alibi_slopes"))


def attention(
    inputs, sequences, scores, dropout_p, deterministic, return_attn_probs, name, positive_empty_lse=True
):  # fmt: skip
    """`inputs`: (q, k, v), (q, kv) or (qkv,); `name`: the public function's; `positive_empty_lse`: as in Run.

    -> out, or (out, softmax_lse, S_dmask).
    """
    settings = (dropout_p, deterministic, return_attn_probs, positive_empty_lse)
    if not is_plain(*inputs):
        return _traced(inputs, sequences, scores, settings)
    if _profiler_enabled():
        with record_function(name):
            return _eager(inputs, sequences, scores, *settings)
    return _eager(inputs, sequences, scores, *settings)


def _eager(inputs, sequences, scores, dropout_p, deterministic, return_attn_probs, positive_empty_lse):
    if _grad_enabled() and _needs_grad(inputs, scores):
        call = Call(len(inputs), sequences, scores, dropout_p, deterministic, return_attn_probs, positive_empty_lse)
        sink, bias = scores.learnable_sink, scores.attn_bias
        if sink is None and bias is None:
            return EagerAttention.apply(call, *inputs)
        return EagerAttention.apply(call, *inputs, sink, bias)
    q, k, v = unpacked(inputs)
    named = current()
    run = _AUTOMATIC
    if deterministic or named or not positive_empty_lse:
        run = Run(named, None, deterministic, False, positive_empty_lse)
    if dropout_p == 0.0 and not return_attn_probs:  # the short way
        out = empty_out(q, v)
        _run.forward(q, k, v, out, None, sequences, scores, None, run)
        return out
    out, lse, S_dmask, _, _ = forward(q, k, v, sequences, scores, dropout_p, run, return_attn_probs, return_attn_probs)
    return (out, lse, S_dmask) if return_attn_probs else out


def _traced(inputs, sequences, scores, settings):
    if len(inputs) == 3:  # packed ones have been checked
        check_tensors(q=inputs[0], k=inputs[1], v=inputs[2])
    needs_grad = _grad_enabled() and _needs_grad(inputs, scores)
    inputs = _distinct(inputs)
    sequences = Sequences(*_distinct(plain_numbers(sequences, OF_SEQUENCES)))
    scores = Scores(*plain_numbers(scores, OF_SCORES))
    return Attention.apply(len(inputs), needs_grad, *settings, *inputs, *sequences, *scores)


def check_constants(scores: Scores) -> None:
    """Refuses what would get no gradient though it asks for one."""
    for i in _CONSTANTS:
        x = scores[i]
        if isinstance(x, Tensor) and x.requires_grad:
            raise InvalidArgument(f"{Scores._fields[i]}: has no gradient; pass it detached, or under torch.no_grad()")


def _needs_grad(inputs, scores) -> bool:
    check_constants(scores)
    for x in inputs:
        if x.requires_grad:
            return True
    for x in (scores.learnable_sink, scores.attn_bias):
        if isinstance(x, Tensor) and x.requires_grad:
            return True
    return False


def _distinct(values) -> list:
    """The same values. While Dynamo traces, it refuses to see a tensor twice among the arguments of an autograd
    function (cu_seqlens_q is cu_seqlens_k, k is v): the second becomes a view."""
    if not torch.compiler.is_compiling():
        return list(values)
    distinct = []
    for x in values:
        if isinstance(x, Tensor):
            for y in distinct:
                if x is y:
                    x = x.view_as(x)
                    break
        distinct.append(x)
    return distinct


def plain_numbers(group, conversions: tuple) -> list:
    """The values of a group, with what eager calls take as a number (0-dimensional tensors, NumPy scalars) made one.
    Operators know Python's numbers only; to read a tensor breaks a graph."""
    values = []
    for convert, x in zip(conversions, group):  # noqa: B905  # Dynamo of torch 2.4 knows no strict zip
        if convert is not None and x is not None and type(x) not in _NUMBER_TYPES:
            x = convert(x)
        values.append(x)
    return values


def draw_rng_state(q: Tensor) -> Tensor:
    """(seed, offset) of a dropout mask, from torch's generator of the device: torch.manual_seed repeats it."""
    return torch.randint(2**63 - 1, (2,), dtype=torch.int64, device=q.device)


def forward(q, k, v, sequences, scores, dropout_p, run, wants_lse, wants_s_dmask, rng_state=None, out=None):
    """-> out, softmax_lse or None, S_dmask or None (empty without dropout), rng_state or None (without dropout), the
    backend's name."""
    if out is None:
        out = empty_out(q, v)
    lse = empty_lse(q) if wants_lse else None
    if dropout_p == 0.0:
        backend = _run.forward(q, k, v, out, lse, sequences, scores, None, run)
        return out, lse, q.new_empty((0,)) if wants_s_dmask else None, rng_state, backend
    if not isinstance(dropout_p, numbers.Real):
        raise InvalidType(f"dropout_p: expected a number, got {type(dropout_p).__name__}")
    dropout = Dropout(float(dropout_p), draw_rng_state(q) if rng_state is None else rng_state)
    backend = _run.forward(q, k, v, out, lse, sequences, scores, dropout, run)
    S_dmask = s_dmask(q, k, sequences, scores, dropout, run) if wants_s_dmask else None
    return out, lse, S_dmask, dropout.rng_state, backend


def gradients(dout, q, k, v, out, lse, dlse, packing, sequences, scores, dropout, run, wants_dsink, wants_dbias):
    """-> the gradients of the inputs (`packing` as empty_gradients takes it), then of sink and bias where wanted."""
    results, (dq, dk, dv) = empty_gradients(q, k, v, packing)
    dsink, dbias = empty_extras(scores, wants_dsink, wants_dbias)
    _run.backward(dout, q, k, v, out, lse, dq, dk, dv, dlse, dbias, dsink, sequences, scores, dropout, run)
    results = list(results)
    if wants_dsink:
        results.append(dsink.to(scores.learnable_sink.dtype))
    if wants_dbias:
        results.append(dbias.to(scores.attn_bias.dtype))
    return results


class Call(NamedTuple):
    """What autograd need not look into: arguments of EagerAttention that are no tensors, or have no gradient."""

    n: int  # of inputs
    sequences: Sequences
    scores: Scores
    dropout_p: float
    deterministic: bool
    return_attn_probs: bool
    positive_empty_lse: bool


class EagerAttention(torch.autograd.Function):
    """Of (Call, inputs), and learnable_sink and attn_bias where there is either: every argument takes autograd time."""

    @staticmethod
    def forward(ctx, call, *leaves):
        n, sequences, scores, dropout_p, deterministic, return_attn_probs, positive_empty_lse = call
        q, k, v = unpacked(leaves[:n])
        named = current()
        run = Run(named, None, deterministic, sequences.block_table is None, positive_empty_lse)
        out, lse, S_dmask, rng_state, backend = forward(
            q, k, v, sequences, scores, dropout_p, run, True, return_attn_probs
        )
        tensors = ()
        if sequences is not FIXED or len(leaves) > n or scores.alibi_slopes is not None:
            tensors = *_tensors(sequences), *_tensors(scores)
            call = call._replace(sequences=_without_tensors(sequences), scores=_without_tensors(scores))
        ctx.save_for_backward(q, k, v, out, lse, rng_state, *tensors)
        ctx.call, ctx.run = call, Run(named, backend, deterministic)
        ctx.set_materialize_grads(False)  # a gradient that does not arrive is None, not zeros that cost time
        if not return_attn_probs:
            return out
        ctx.mark_non_differentiable(S_dmask)
        return out, lse, S_dmask

    @staticmethod
    def backward(ctx, dout, *more):
        call = ctx.call
        needed = ctx.needs_input_grad[1 + call.n :]
        wants = needed or (False, False)
        results = _differentiate(
            ctx.saved_tensors, dout, more[0] if more else None, call.sequences, call.scores, call.n, call.dropout_p,
            ctx.run, *wants,
        )  # fmt: skip
        if not needed:
            return None, *results
        return None, *results[: call.n], *_in_place(results[call.n :], needed)


_SETTINGS = 6  # arguments of Attention before the inputs


class Attention(torch.autograd.Function):
    """(inputs, Sequences, Scores), flat, since Dynamo looks for tensors among arguments only."""

    @staticmethod
    def forward(ctx, n, needs_grad, dropout_p, deterministic, return_attn_probs, positive_empty_lse, *flat):
        inputs, rest = flat[:n], flat[n:]
        sequences = Sequences(*rest[: len(_SEQUENCES)])
        scores = Scores(*rest[len(_SEQUENCES) :])
        q, k, v = unpacked(inputs)
        out, lse, S_dmask, rng_state = _operator(
            q, k, v, sequences, scores, dropout_p, return_attn_probs, positive_empty_lse
        )
        if needs_grad:
            ctx.save_for_backward(q, k, v, out, lse, rng_state if dropout_p != 0.0 else None, *_tensors(sequences),
                                  *_tensors(scores))  # fmt: skip
            ctx.numbers = _without_tensors(sequences), _without_tensors(scores)
            ctx.n, ctx.dropout_p = n, dropout_p
            ctx.run = Run(None if torch.compiler.is_compiling() else current(), None, deterministic)
            if return_attn_probs:
                ctx.mark_non_differentiable(S_dmask)
        return (out, lse, S_dmask) if return_attn_probs else out

    @staticmethod
    def backward(ctx, dout, *more):
        needed = ctx.needs_input_grad[_SETTINGS + ctx.n + len(_SEQUENCES) :]
        wants = [needed[i] for i in _WANTED]
        results = _differentiate(
            ctx.saved_tensors, dout, more[0] if more else None, *ctx.numbers, ctx.n, ctx.dropout_p, ctx.run, *wants
        )
        of_scores = [None] * len(_SCORES)
        for i, x in zip(_WANTED, _in_place(results[ctx.n :], wants)):  # noqa: B905  # Dynamo of torch 2.4, again
            of_scores[i] = x
        return *(None,) * _SETTINGS, *results[: ctx.n], *(None,) * len(_SEQUENCES), *of_scores


def _differentiate(saved, dout, dlse, sequences, scores, n, dropout_p, run, wants_dsink, wants_dbias):
    """-> the gradients of the inputs, then of sink and bias where wanted. `saved`: q, k, v, out, lse, rng_state, and,
    unless there are none at all, the tensors of `sequences` and `scores`, which hold the rest."""
    q, k, v, out, lse, rng_state, *tensors = saved
    if dout is None:
        dout = torch.zeros_like(out)
    if tensors:
        sequences, scores = _with_tensors((sequences, scores), tensors)
    if sequences.block_table is not None:
        raise NotServed("block_table: pages of keys and values are not differentiable")
    dropout = NO_DROPOUT if rng_state is None else Dropout(float(dropout_p), rng_state)
    call = (dout, q, k, v, out, lse, dlse, 3 - n)
    if is_plain(dout, q, k, v):
        results = gradients(*call, sequences, scores, dropout, run, wants_dsink, wants_dbias)
        if _grad_enabled():  # results of a graph of their own (create_graph=True) would be constants to it
            words = "second derivatives of attention are not served"
            results = refuse_gradient(words, results, (dout, dlse, q, k, v, *scores))
        return results
    call = (*call, *sequences, *scores, *dropout, run.deterministic, wants_dsink, wants_dbias)
    if run.backend is None:
        return _ops._flash_attn_gradients(*call)
    with use_backend(run.backend):  # an operator has no argument for it
        return _ops._flash_attn_gradients(*call)


def _in_place(extras, wanted) -> list:
    """The gradients of sink and bias, None where not wanted."""
    extras = list(extras)
    return [extras.pop(0) if is_wanted else None for is_wanted in wanted]


def _tensors(group) -> list:
    return [x if isinstance(x, Tensor) else None for x in group]


def _without_tensors(group) -> tuple:
    return tuple([None if isinstance(x, Tensor) else x for x in group])


def _with_tensors(numbers, tensors) -> tuple[Sequences, Scores]:
    values = [*numbers[0], *numbers[1]]
    for i, x in enumerate(tensors):
        if x is not None:
            values[i] = x
    return Sequences(*values[: len(_SEQUENCES)]), Scores(*values[len(_SEQUENCES) :])


def _operator(q, k, v, sequences, scores, dropout_p, return_softmax, positive_empty_lse):
    """The forward as an operator in a graph: -> out, softmax_lse, S_dmask, rng_state."""
    named = {}
    for i, name in enumerate(_SCORES):
        named[name] = scores[i]
    if named["softmax_scale"] is None:
        named["softmax_scale"] = q.shape[-1] ** -0.5 if q.dim() and q.shape[-1] else 1.0
    named["dropout_p"], named["return_softmax"] = dropout_p, return_softmax
    named["rng_state"] = draw_rng_state(q) if dropout_p > 0 else None
    named["positive_empty_lse"] = positive_empty_lse
    if sequences.cu_seqlens_q is None:
        return _ops._flash_attn_forward(q, k, v, **named)
    for i, name in enumerate(_SEQUENCES):
        if sequences[i] is not None:
            named[name] = sequences[i]
    for name in ("max_seqlen_q", "max_seqlen_k"):
        if name not in named:
            named[name] = -1
    return _ops._flash_attn_varlen_forward(q, k, v, **named)
