"""The error criterion: as exact as the plain PyTorch arithmetic in the input's dtype.

In 16 bits, literally: max|ours - exact| <= max|plain - exact|, plus the one rounding of the result (where the plain
arithmetic happens to err by less, or not at all: one key, one dimension).

In fp32 both err by a few roundings of the same sums in different orders, so a single largest error compares luck: twice
the plain one is allowed, and the rounding of scores and of lse to fp32, which moves every probability of a row by a
factor of 1 + eps/2 * |score|. (Gradients start from that rounded lse; the plain arithmetic keeps its probabilities.)

dq and dk are sums of differences dout.v - dout.out that may cancel to nothing, wholly so in rows that see one key. They
may err by a rounding in fp32 of the terms of that difference, `cancelling_terms`; so may the gradient of a bias, by
`dot_terms`.
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


def dot_terms(v: Tensor, dout: Tensor) -> float:
    """The size of what the gradient of a score is the difference of, |dout.v| + |dout.out|. Batched or packed.

    Where there are few products dout.v, all may be small by luck: their partial sums are of size |dout| |v| / 2 or so.
    """
    if not v.numel() or not dout.numel():
        return 0.0
    v = v.double().repeat_interleave(dout.shape[-2] // v.shape[-2], -2)
    rows = "bihd,bjhd->bhij" if v.dim() == 4 else "ihd,jhd->hij"
    dots = torch.einsum(rows, dout.double(), v)
    return max(2 * largest(dots), largest(dout.double().norm(dim=-1)) * largest(v.norm(dim=-1)) / 2)


def cancelling_terms(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, scale: float | None = None) -> float:
    """The size of what dq and dk are differences of, scale * dot_terms * |q or k|."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return scale * dot_terms(v, dout) * max(largest(q), largest(k))


def score_terms(q: Tensor, k: Tensor, scale: float | None = None) -> float:
    """The size of what a score is a sum of, scale * |q| |k|: where it cancels to nothing, that size was rounded."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return scale * largest(q.double().norm(dim=-1)) * largest(k.double().norm(dim=-1))


def assert_as_exact(
    ours: Tensor, exact: Tensor, plain: Tensor, name: str, scores: float, terms: float, luck: float = 1
) -> None:
    """`scores`: the size at which scores and lse are rounded. `terms`: that of what cancels in the result, or 0.

    `luck`: how many times the plain error, where that is more than said above.
    """
    got, theirs = error(ours, exact), error(plain, exact)
    half_unit = torch.finfo(ours.dtype).eps / 2
    if ours.dtype == torch.float32:
        rounded = 1 + scores if name == "softmax_lse" else 0  # 1: of the sum that it is the logarithm of
        allowed = max(2, luck) * theirs + half_unit * (largest(exact) * (2 + scores) + rounded)
    else:
        allowed = luck * theirs + half_unit * largest(exact)
    together = 8 if largest(exact) == 0 else 1  # nothing but roundings, of several rows and heads of a group
    allowed += torch.finfo(torch.float32).eps * terms * together
    assert got <= allowed, f"{name}: error {got:.3e}, allowed {allowed:.3e} (plain: {theirs:.3e})"
