"""Operators made of Triton kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch.library import custom_op

__all__ = ["triton_op"]


def triton_op(
    name: str,
    fn: Callable | None = None,
    /,
    *,
    mutates_args: str | Iterable[str],
    schema: str | None = None,
    allow_decomposition: bool = True,
) -> Callable:
    """torch.library.triton_op with a schema of one's own: a decorator, or applied to fn.

    fn makes the shapes for tracing, too. allow_decomposition: compilers see the kernels inside, where torch has
    triton_op (2.6) and makes the schema itself; else the operator is one piece to them.
    """

    def define(function: Callable):
        if allow_decomposition and schema is None and hasattr(torch.library, "triton_op"):
            return torch.library.triton_op(name, function, mutates_args=mutates_args)
        operator = custom_op(name, function, mutates_args=mutates_args, schema=schema)
        operator.register_fake(function)
        return operator

    return define if fn is None else define(fn)
