"""Upstream's autograd classes by their names: callers use `apply`, with upstream's positional arguments."""

from __future__ import annotations

import inspect
import types

import torch


def autograd_class(function, name: str, doc: str, order=None, required: int | None = None) -> type:
    """The class of a public function.

    `order`: the names of upstream's arguments, where that is not the function's order with is_grad_enabled at the end.
    `required`: how many of them have no default; None: all.
    """
    upstreams = [p for p in inspect.signature(function).parameters.values() if p.kind is not p.KEYWORD_ONLY]
    defaults = {"return_softmax" if p.name == "return_attn_probs" else p.name: p.default for p in upstreams}
    names = [*defaults, "is_grad_enabled"] if order is None else list(order)
    required = len(names) if required is None else required

    def apply(*values):
        if not required <= len(values) <= len(names):
            raise TypeError(f"{name}.apply: expected {len(names)} arguments ({', '.join(names)}), got {len(values)}")
        call = {n: defaults[n] for n in names[len(values) :]}
        call.update(zip(names, values, strict=False))
        if "return_softmax" in call:
            call["return_attn_probs"] = call.pop("return_softmax")
        with torch.set_grad_enabled(call.pop("is_grad_enabled", True) and torch.is_grad_enabled()):
            return function(**call)

    def forward(ctx, *values):
        return apply(*values)

    def parameter(n, default=inspect.Parameter.empty):
        return inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default)

    parameters = [parameter("ctx"), *map(parameter, names[:required])]
    parameters += [parameter(n, defaults[n]) for n in names[required:]]
    forward.__signature__ = inspect.Signature(parameters)
    members = {
        "__doc__": doc,
        "__module__": function.__module__,
        "apply": staticmethod(apply),
        "forward": staticmethod(forward),
    }
    return types.new_class(name, (torch.autograd.Function,), exec_body=lambda body: body.update(members))
