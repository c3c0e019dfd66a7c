"""One call, one object: the groups in which arguments travel from a public function to a kernel.

A new keyword is a field of its group here (with its default; an extension beyond upstream's signature is named in
EXTENSIONS too), a line of the same group in bindings/groups.cpp, and a use. Public signatures, operator schemas and the
autograd function are made from the groups.
"""

from __future__ import annotations

import inspect
from typing import NamedTuple

from flash_attn import _C
from flash_attn._errors import InvalidArgument, InvalidType

try:
    from torch import Tensor
except ModuleNotFoundError:  # flash_attn.attention takes arrays of other packages
    Tensor = object


class Sequences(NamedTuple):
    """Who attends to whom. All tables are int32 on the device of q."""

    cu_seqlens_q: Tensor | None = None  # (batch + 1): q is packed
    cu_seqlens_k: Tensor | None = None  # (batch + 1): k and v are packed
    max_seqlen_q: int | None = None  # None: the longest
    max_seqlen_k: int | None = None
    seqused_q: Tensor | None = None  # (batch)
    seqused_k: Tensor | None = None  # (batch)
    used_k: int | None = None  # of every sequence, instead of seqused_k
    leftpad_k: Tensor | None = None  # (batch)
    cache_batch_idx: Tensor | None = None  # (batch)
    block_table: Tensor | None = None  # (batch, max_blocks)


class Scores(NamedTuple):
    """What a score is."""

    softmax_scale: float | None = None  # None: headdim ** -0.5
    causal: bool = False
    window_size_left: int = -1
    window_size_right: int = -1
    softcap: float = 0.0
    alibi_slopes: Tensor | None = None  # fp32 (nheads) or (batch, nheads)
    learnable_sink: Tensor | None = None  # (nheads)
    attn_bias: Tensor | None = None  # (batch | 1, nheads | 1, seqlen_q | 1, seqlen_k)
    attention_chunk: int = 0


class Dropout(NamedTuple):
    dropout_p: float = 0.0
    rng_state: Tensor | None = None  # int64 (2), on the device of q: seed and offset


class Run(NamedTuple):
    """How to run, never what to compute."""

    backend: str | None = None  # named: this one, or an error
    prefer: str | None = None  # asked first where none is named
    deterministic: bool = False
    differentiable: bool = False  # a backward will follow
    positive_empty_lse: bool = True  # of a row that sees nothing, as FlashAttention-2 has it


class NewKeys(NamedTuple):
    """Keys that join a cache."""

    k: Tensor | None = None
    v: Tensor | None = None
    cu_seqlens: Tensor | None = None


class Rotary(NamedTuple):
    cos: Tensor | None = None
    sin: Tensor | None = None
    interleaved: bool = False
    positions: Tensor | None = None


for _group in (Sequences, Scores, Dropout, Run, NewKeys, Rotary):
    if _group._fields != _C.group_fields()[_group.__name__]:
        raise ImportError(
            f"flash_attn: {_group.__name__} here and in the compiled module differ; reinstall the package"
        )

FIXED = Sequences()
NO_DROPOUT = Dropout()

# Keywords of every public function beyond upstream's.
EXTENSIONS = ("learnable_sink", "attn_bias", "attention_chunk")


def show_keywords(function, defaults: dict):
    """A function that takes `**extensions`, shown with them as keyword-only parameters: callers look at signatures."""
    signature = inspect.signature(function)
    own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    more = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=x) for name, x in defaults.items()]
    function.__signature__ = signature.replace(parameters=own + more)
    return function


def extended(function):
    return show_keywords(function, {name: Scores._field_defaults[name] for name in EXTENSIONS})


def scores_of(softmax_scale, causal, window_size, softcap, alibi_slopes, extensions: dict) -> Scores:
    try:
        left, right = window_size
    except (TypeError, ValueError):
        raise InvalidArgument(f"window_size: expected two integers (left, right), got {window_size!r}") from None
    if not extensions:
        return Scores(softmax_scale, causal, left, right, softcap, alibi_slopes)
    for name in extensions:
        if name not in EXTENSIONS:
            raise TypeError(
                f"unexpected keyword argument {name!r}; beyond upstream's there are {', '.join(EXTENSIONS)}"
            )
    return Scores(softmax_scale, causal, left, right, softcap, alibi_slopes, **extensions)


def check_tensors(**tensors) -> None:
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise InvalidType(f"{name}: expected a torch.Tensor, got {type(x).__name__}")
