"""How an operator is defined: its schema, what runs it, its shapes, and that it has no derivative.

Operators are defined on a Library: its dispatch costs a third of what torch.library.custom_op's wrappers do. What those
do for autograd is done here: differentiating an operator raises, where autograd's default is a warning and no gradient.
"""

from __future__ import annotations

import functools
import typing

import torch
from torch import Tensor
from torch.autograd import forward_ad

from flash_attn import _flops
from flash_attn._errors import NotServed
from flash_attn._refusal import refuse_gradient
from flash_attn._tensors import is_plain


@functools.cache
def _library(namespace: str) -> torch.library.Library:
    return torch.library.Library(namespace, "FRAGMENT")


_TAGS = (torch.Tag.pt2_compliant_tag, getattr(torch.Tag, "needs_exact_strides", torch.Tag.needs_fixed_stride_order))
_KINDS = {
    Tensor | None: "Tensor?",
    int: "SymInt",
    int | None: "SymInt?",
    float: "float",
    float | None: "float?",
    bool: "bool",
}
_below_autograd = torch._C._after_autograd_keyset
_below_views = torch._C._after_ADInplaceOrView_keyset


def declare(group, *, without=(), required=False) -> str:
    """The fields of a group as arguments of a schema: "Tensor? attn_bias=None, SymInt attention_chunk=0"."""
    arguments = []
    kinds = typing.get_type_hints(group)
    for name, default in group._field_defaults.items():
        if name not in without:
            kind = _KINDS[kinds[name]]
            arguments.append(f"{kind} {name}" + ("" if required else f"={default}"))
    return ", ".join(arguments)


def pick(group, call: dict):
    """The group of those of its fields that a call has."""
    return group._make(map(call.get, group._fields, group._field_defaults.values()))


def define(schema: str, function, fake, flops, namespace: str = "flash_attn") -> None:
    """`function` gets a dict of all arguments by name; so do `fake`, which returns tensors of the same shapes, and
    `flops`, which counts."""
    name = schema[: schema.index("(")]
    library = _library(namespace)
    library.define(schema, tags=_TAGS)
    packet = getattr(getattr(torch.ops, namespace), name)
    operator = packet.default
    arguments = operator._schema.arguments
    names = [a.name for a in arguments]
    defaults = {a.name: a.default_value for a in arguments if a.has_default_value()}
    tensors_at = [i for i, a in enumerate(arguments) if "Tensor" in str(a.type)]
    written_at = [i for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write]
    no_derivative = f"{namespace}::{name} has no derivative: call flash_attn's functions"

    def by_name(values, keywords) -> dict:
        call = defaults.copy()
        call.update(zip(names, values, strict=False), **keywords)
        return call

    def run(*values, **keywords):
        return function(by_name(values, keywords))

    def run_fake(*values, **keywords):
        return fake(by_name(values, keywords))

    def run_in_autograd(keys, *values, **keywords):
        tensors = [values[i] for i in tensors_at if i < len(values) and values[i] is not None]
        if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(x).tangent is not None for x in tensors):
            raise NotServed(no_derivative)
        inputs = [x for x in tensors if x.requires_grad] if torch.is_grad_enabled() else ()
        if inputs:
            with torch.no_grad():
                results = operator.redispatch(keys & _below_autograd, *values, **keywords)
            return refuse_gradient(no_derivative, results, inputs)
        if not written_at and is_plain(*tensors):
            return run(*values, **keywords)
        return operator.redispatch(keys & _below_autograd, *values, **keywords)

    def note_writes(keys, *values, **keywords):
        """Autograd must know if it has saved one of the tensors that are written to."""
        call = by_name(values, keywords)
        for i in written_at:
            x = call[names[i]]
            if x is not None and not x.is_inference():
                torch.autograd.graph.increment_version(x)
        return operator.redispatch(keys & _below_views, *values, **keywords)

    library.impl(name, run, "CompositeExplicitAutograd")
    library.impl(name, run_in_autograd, "Autograd", with_keyset=True)
    if written_at:
        library.impl(name, note_writes, "ADInplaceOrView", with_keyset=True)
    torch.library.register_fake(f"{namespace}::{name}", run_fake, lib=library)
    _flops.register(packet, names, flops)
