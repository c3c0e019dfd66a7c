"""Activations and their derivatives by name, as functions of tensors. Upstream's are of Triton blocks.

Each takes x (...) and returns f(x), or f'(x): not yet multiplied by a gradient.
"""

from __future__ import annotations

import math
from enum import Enum

import torch
import torch.nn.functional as F
from torch import Tensor


class Activation(str, Enum):
    SquaredReLU = "squared_relu"
    GeLU = "gelu"
    GeLUApprox = "gelu_approx"
    LeakyReLU = "leaky_relu"
    ReLU = "relu"


def tanh(x: Tensor) -> Tensor:
    return torch.tanh(x)


def cosh(x: Tensor) -> Tensor:
    return torch.cosh(x)


def relu(x: Tensor) -> Tensor:
    return F.relu(x)


def relu_grad(x: Tensor) -> Tensor:
    """1 where x >= 0, as upstream has it at 0."""
    return (x >= 0).to(x.dtype)


def squared_relu(x: Tensor) -> Tensor:
    """relu(x)^2 (So et al., arXiv 2109.08668)."""
    return F.relu(x).square()


def squared_relu_grad(x: Tensor) -> Tensor:
    return 2.0 * F.relu(x)


def leaky_relu(x: Tensor) -> Tensor:
    return F.leaky_relu(x, 0.01)


def leaky_relu_grad(x: Tensor) -> Tensor:
    """1 where x >= 0, else 0.01."""
    return torch.where(x >= 0, torch.ones_like(x), 0.01)


def gelu(x: Tensor) -> Tensor:
    """x times the normal distribution's cumulative function at x (Hendrycks and Gimpel, arXiv 1606.08415)."""
    return F.gelu(x)


def gelu_grad(x: Tensor) -> Tensor:
    return 0.5 * (1.0 + torch.erf(x * math.sqrt(0.5))) + x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


def gelu_approx(x: Tensor) -> Tensor:
    """gelu with the cumulative function approximated by tanh."""
    return F.gelu(x, approximate="tanh")


def gelu_approx_grad(x: Tensor) -> Tensor:
    return torch.ops.aten.gelu_backward(torch.ones_like(x), x, approximate="tanh")


_FUNCTIONS = {
    Activation.ReLU: (relu, relu_grad),
    Activation.LeakyReLU: (leaky_relu, leaky_relu_grad),
    Activation.GeLU: (gelu, gelu_grad),
    Activation.GeLUApprox: (gelu_approx, gelu_approx_grad),
    Activation.SquaredReLU: (squared_relu, squared_relu_grad),
}


def get_triton_activation_kernel(activation: Activation | None):
    """-> the function of that name, or None of None."""
    return _FUNCTIONS[Activation(activation)][0] if activation else None


def get_triton_activation_bwd_kernel(activation: Activation | None):
    """-> the derivative of that name, or None of None."""
    return _FUNCTIONS[Activation(activation)][1] if activation else None
