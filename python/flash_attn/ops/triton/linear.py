"""A linear layer with an activation, and the gradient through both."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from flash_attn._errors import InvalidArgument
from flash_attn.ops._norm import arithmetic
from flash_attn.ops.triton.k_activations import (
    get_triton_activation_bwd_kernel,
    get_triton_activation_kernel,
)

__all__ = ["triton_dgrad_act", "triton_linear_act"]

_NAMES = ("id", "gelu", "gelu_approx", "squared_relu")


def _check(activation: str) -> None:
    if activation not in _NAMES:
        raise InvalidArgument(f"activation: expected one of {_NAMES}, got {activation!r}")


def triton_linear_act(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "id", save_act_input: bool = False
):
    """x (..., in_features), weight (out_features, in_features), bias (out_features) -> activation(x @ weight' + bias).

    Also returns what the activation was applied to, if save_act_input.
    """
    _check(activation)
    act_input = F.linear(x, weight, bias)
    out = act_input if activation == "id" else get_triton_activation_kernel(activation)(act_input)
    return (out, act_input) if save_act_input else out


def triton_dgrad_act(
    grad_output: Tensor, weight: Tensor, activation: str = "id", act_input: Tensor | None = None
) -> Tensor:
    """(grad_output @ weight) * activation'(act_input) -> (..., in_features).

    grad_output (..., out_features), weight (out_features, in_features). act_input (..., in_features): what the
    activation before this layer was applied to.
    """
    _check(activation)
    dx = grad_output @ weight
    if activation == "id":
        return dx
    if act_input is None:
        raise InvalidArgument(f"act_input: expected what {activation} was applied to, got None")
    dtype = arithmetic(dx)
    return (dx.to(dtype) * get_triton_activation_bwd_kernel(activation)(act_input.to(dtype))).to(dx.dtype)
