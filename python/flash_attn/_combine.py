"""Attention over parts of the keys, put together.

With w_s = exp(lse_s - lse) and lse = log sum_s exp(lse_s), out = sum_s w_s out_s.
"""

from __future__ import annotations

import torch
from torch import Tensor


def combined(out_partial: Tensor, lse_partial: Tensor) -> tuple[Tensor, Tensor]:
    """(splits, ..., headdim_v) and (splits, ...), of one dtype -> out (..., headdim_v), lse (...).

    A part whose lse is -inf or +inf saw no key, and its out is not looked at. Where no part saw any, out is 0 and lse
    -inf. Differentiable.
    """
    empty = torch.isinf(lse_partial)
    lse_partial = lse_partial.masked_fill(empty, -torch.inf)
    top = lse_partial.detach().amax(0)
    top = top.masked_fill(top == -torch.inf, 0)
    weights = torch.exp(lse_partial - top)
    total = weights.sum(0)
    nothing = total == 0
    lse = torch.log(total.masked_fill(nothing, 1)) + top
    lse = lse.masked_fill(nothing, -torch.inf)
    weights = weights / total.masked_fill(nothing, 1)
    result = (out_partial.masked_fill(empty[..., None], 0) * weights[..., None]).sum(0)
    return result, lse
