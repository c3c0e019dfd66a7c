"""The error criterion: as exact as the plain PyTorch arithmetic in the input's dtype.

In 16 bits, literally: max|ours - exact| <= max|plain - exact|, plus the one rounding of the result (where the plain
arithmetic happens to err by less, or not at all: one key, one dimension).

In fp32 both err by a few roundings of the same sums in different orders, so a single largest error compares luck: twice
the plain one is allowed, and the rounding of scores and of lse to fp32, which moves every probability of a row by a
factor of 1 + eps/2 * |lse|. (The gradient starts from that rounded lse; the plain arithmetic keeps its probabilities.)
"""

from __future__ import annotations

import torch
from torch import Tensor


def error(x: Tensor, exact: Tensor) -> float:
    """Largest absolute difference; infinities must agree exactly, NaN is never right."""
    assert x.shape == exact.shape, (x.shape, exact.shape)
    assert not x.isnan().any() and not exact.isnan().any()
    x = x.double()
    difference = torch.where(x == exact, torch.zeros_like(exact), (x - exact).abs())
    return float(difference.max()) if difference.numel() else 0.0


def largest(x: Tensor) -> float:
    finite = x[torch.isfinite(x)]
    return float(finite.abs().max()) if finite.numel() else 0.0


def assert_as_exact(ours: Tensor, exact: Tensor, plain: Tensor, name: str, lse: Tensor, terms: float = 0.0) -> None:
    """`lse`: of the call. `terms`: the size of what cancels where the exact result is 0 everywhere (see below)."""
    got, theirs = error(ours, exact), error(plain, exact)
    half_unit = torch.finfo(ours.dtype).eps / 2
    if ours.dtype == torch.float32:
        allowed = 2 * theirs + half_unit * largest(exact) * (2 + largest(lse))
    else:
        allowed = theirs + half_unit * largest(exact)
    if largest(exact) == 0 and name in ("dq", "dk"):
        # Rows that see one key have a constant softmax: dq is dout.v - dout.out, equal sums taken in different orders.
        allowed = torch.finfo(torch.float32).eps * terms
    assert got <= allowed, f"{name}: error {got:.3e}, allowed {allowed:.3e} (plain: {theirs:.3e})"
