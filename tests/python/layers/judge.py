"""A function and its gradients against its formula: in float64, the measure; in the inputs' dtypes, the yardstick."""

from __future__ import annotations

import torch
from support.compare import assert_as_exact, largest
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def is_float(x) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def run(function, inputs: dict, douts: list[Tensor | None] | None = None) -> tuple[list[Tensor], dict[str, Tensor]]:
    """-> the results of function(**inputs), and the gradients of those inputs that require one.

    douts: gradients of the results; None for a result that takes no part.
    """
    leaves = {n: x.detach().clone().requires_grad_(x.requires_grad) if is_float(x) else x for n, x in inputs.items()}
    outs = function(**leaves)
    outs = list(outs) if isinstance(outs, tuple) else [outs]
    if douts is None:
        return outs, {}
    wanted = {n: x for n, x in leaves.items() if is_float(x) and x.requires_grad}
    pairs = [(y, g.to(y.dtype)) for y, g in zip(outs, douts, strict=True) if g is not None]
    grads = torch.autograd.grad([y for y, _ in pairs], list(wanted.values()), [g for _, g in pairs])
    return outs, dict(zip(wanted, grads, strict=True))


def judge(function, formula, inputs: dict, terms: float = 0.0, luck: float = 1) -> None:
    """Results and gradients of `function` are as exact as those of `formula` in the inputs' dtypes.

    `terms`: how many of the largest result may cancel. The results' gradients are drawn at random.
    """
    wide = {n: x.detach().double().requires_grad_(x.requires_grad) if is_float(x) else x for n, x in inputs.items()}
    shapes = [y.shape for y in run(formula, wide)[0]]
    dtypes = [y.dtype for y in run(function, inputs)[0]]
    douts = [torch.randn(shape, dtype=torch.float32).to(dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
    outs, grads = run(function, inputs, douts)
    exact_outs, exact_grads = run(formula, wide, [g.double() for g in douts])
    plain_outs, plain_grads = run(formula, inputs, douts)
    assert list(grads) == list(exact_grads)
    named = [(f"result {i}", *three) for i, three in enumerate(zip(outs, exact_outs, plain_outs, strict=True))]
    named += [(f"d{n}", grads[n], exact_grads[n], plain_grads[n]) for n in grads]
    for name, *three in named:
        x, exact, plain = (t.detach() for t in three)
        if name.startswith("d"):
            assert x.dtype == inputs[name[1:]].dtype, name
        assert_as_exact(x, exact, plain, name, 0.0, terms * largest(exact), luck)
