"""Gradients that are not served raise. They are never zero, and never missing."""

from __future__ import annotations

import torch
from torch import Tensor

from flash_attn._errors import NotServed


class Refusal(torch.autograd.Function):
    """The same tensors, in a graph whose differentiation raises."""

    @staticmethod
    def forward(ctx, words: str, n: int, *tensors):
        ctx.words = words
        ctx.mark_dirty(*tensors[:n])  # the tensors themselves: a view could not be written to any more
        return tensors[:n]

    @staticmethod
    def backward(ctx, *_):
        raise NotServed(ctx.words)


def refuse_gradient(words: str, results, inputs, written=()):
    """`results` (a tensor, or several that nothing depends on yet), as functions of `inputs` whose gradient raises
    `words`. `written`: inputs that were written to since; they count, but autograd may not look at them any more."""
    inputs = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
    if not inputs and any(x.requires_grad for x in written):
        inputs = [torch.empty(0, requires_grad=True, device="cpu")]
    if not inputs:
        return results
    if isinstance(results, Tensor):
        return Refusal.apply(words, 1, results, *inputs)[0]
    return type(results)(Refusal.apply(words, len(results), *results, *inputs))
