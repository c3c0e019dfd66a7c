"""Matrix products in which what is hidden takes no part.

An entry of 0 for what a row does not see is not enough: 0 * inf and 0 * NaN are NaN, and a NaN would reach rows that do
not depend on it. So the finite part of `b` is multiplied as it is, and what is not finite is counted over visible
entries: `hits` of any kind, `signed` those with the sign of their product. Where all hits are infinities of one sign
the result is that infinity, else NaN (which is also what a visible 0 * inf gives).
"""

from __future__ import annotations

import torch
from torch import Tensor


def masked_product(a: Tensor, b: Tensor, visible: Tensor | None) -> Tensor:
    """a (..., M, K), 0 where not `visible` (..., M, K) @ b (..., K, N); None: all is visible."""
    if visible is None:
        return a @ b
    finite = torch.isfinite(b)
    result = a @ b.masked_fill(~finite, 0.0)
    hits = visible.to(a.dtype) @ (~finite).to(b.dtype)
    signed = torch.sign(a) @ torch.sign(b).masked_fill(~torch.isinf(b), 0.0)
    beyond = torch.where(hits == signed.abs(), signed * torch.inf, torch.nan)
    return result + beyond.masked_fill(hits == 0, 0.0)
