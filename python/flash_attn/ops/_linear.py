"""What linear layers with a backward of their own share."""

from __future__ import annotations

import torch
from torch import Tensor


def linear_dtype(x: Tensor) -> torch.dtype:
    """The dtype a linear layer of x runs in: autocast's where that is on."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def parameter_gradients(dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """dout (..., out_features), x (..., in_features) -> the gradients of weight and bias, in their dtypes."""
    dout, x = dout.reshape(-1, dout.shape[-1]), x.reshape(-1, x.shape[-1])
    dweight = (dout.t() @ x).to(weight.dtype)
    if bias is None:
        return dweight, None
    return dweight, dout.sum(0, dtype=torch.promote_types(dout.dtype, torch.float32)).to(bias.dtype)
