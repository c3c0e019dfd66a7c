"""A caller's score_mod, mask_mod and score_mod_bwd, as the engine calls them: with all numbers, and SeqlenInfo last."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import PurePath

import torch
from torch import Tensor

from flash_attn._errors import InvalidArgument, InvalidType, NotServed

NUMBERS = {
    "score_mod": ("score", "b", "h", "q_idx", "kv_idx"),
    "score_mod_bwd": ("dscore", "score", "b", "h", "q_idx", "kv_idx"),
    "mask_mod": ("b", "h", "q_idx", "kv_idx"),
}


def _is_cute(function) -> bool:
    """Whether it is compiled by the CuTe DSL (@cute.jit leaves its mark on what it wraps)."""
    while function is not None:
        code = getattr(function, "__code__", None)
        if hasattr(function, "_dsl_object") or (code and "cutlass" in PurePath(code.co_filename).parts):
            return True
        function = getattr(function, "__wrapped__", getattr(function, "func", None))
    return False


def _required(function, name: str) -> int:
    """How many arguments a function cannot do without. Those with a default are its own."""
    try:
        parameters = _signature(function).parameters.values()
    except (TypeError, ValueError):
        raise InvalidType(f"{name}: its parameters cannot be read; wrap it in a Python function") from None
    for p in parameters:
        if p.kind is p.KEYWORD_ONLY and p.default is p.empty:
            raise InvalidType(f"{name}: its keyword-only parameter {p.name} would get no value")
    required = sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is p.empty for p in parameters)
    any_number = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    return max(required, len(NUMBERS[name])) if any_number else required


def _signature(function) -> inspect.Signature:
    return inspect.signature(function.forward if isinstance(function, torch.nn.Module) else function)


def adapted(name: str, function, aux_tensors, aux_scalars) -> Callable | None:
    """function(*numbers[, aux_tensors]), as FlexAttention has it, or FlashAttention-4's function(*numbers, seqlen_info,
    aux_tensors[, aux_scalars]) -> f(*numbers, info)."""
    if function is None:
        return None
    if not callable(function):
        raise InvalidType(f"{name}: expected a function of PyTorch numbers, got {type(function).__name__}")
    if _is_cute(function):
        raise NotServed(
            f"{name}: a function of the CuTe DSL (@cute.jit) runs in FlashAttention-4's own kernels only; pass one "
            f"written in PyTorch, {name}({', '.join(NUMBERS[name])})"
        )
    numbers = len(NUMBERS[name])
    more = _required(function, name) - numbers
    if more == 0:
        return lambda *x: function(*x[:-1])
    if more == 1:
        if aux_tensors is None:
            raise InvalidArgument(f"aux_tensors: {name} takes them as its last argument, got None")
        return lambda *x: function(*x[:-1], aux_tensors)
    if more == 2:
        return lambda *x: function(*x, aux_tensors)
    if more == 3:
        return lambda *x: function(*x, aux_tensors, aux_scalars)
    raise InvalidType(
        f"{name}: expected parameters ({', '.join(NUMBERS[name])}[, aux_tensors]), or with seqlen_info, aux_tensors"
        f"[, aux_scalars] after these numbers; got {_name(function)}{_signature(function)}"
    )


def _name(function) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__name__", type(function).__name__)


def check_aux_tensors(aux_tensors) -> None:
    if aux_tensors is None:
        return
    if not isinstance(aux_tensors, (list, tuple)) or not all(isinstance(x, Tensor) for x in aux_tensors):
        raise InvalidType("aux_tensors: expected a list of tensors")
