"""Activations of MLPs and their gradients, on PyTorch's operations. Each keeps its inputs only, and rounds once.

GELU is here the approximation by tanh (Hendrycks and Gimpel, arXiv 1606.08415). g is the gradient of the result.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from flash_attn._errors import InvalidArgument
from flash_attn._tensors import result_of_function
from flash_attn.ops._blocks import row_blocks

__all__ = [
    "FastGeLUFunction",
    "GeLUFunction",
    "SwiGLUFunction",
    "bias_gelu",
    "bias_gelu_back",
    "bias_gelu_impl",
    "fast_gelu_impl",
    "gelu_bwd",
    "gelu_fwd",
    "relu_bwd",
    "sqrelu_bwd",
    "sqrelu_fwd",
    "swiglu",
    "swiglu_bwd",
    "swiglu_fwd",
]


def _wide(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors)


def gelu_fwd(x: Tensor) -> Tensor:
    """x (...) -> gelu(x)."""
    return F.gelu(x, approximate="tanh")


def gelu_bwd(g: Tensor, x: Tensor) -> Tensor:
    """-> the gradient of x, in x's dtype."""
    return torch.ops.aten.gelu_backward(*_wide(g, x), approximate="tanh").to(x.dtype)


def bias_gelu(y: Tensor, bias: Tensor) -> Tensor:
    """y (..., columns), bias (columns) -> gelu(y + bias), in y's dtype."""
    wide, b = _wide(y, bias)
    return F.gelu(wide + b, approximate="tanh").to(y.dtype)


def bias_gelu_back(g: Tensor, y: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """-> the gradients of y and bias, in their dtypes."""
    g, wide, b = _wide(g, y, bias)
    dy = torch.ops.aten.gelu_backward(g, wide + b, approximate="tanh")
    return dy.to(y.dtype), dy.reshape(-1, dy.shape[-1]).sum(0).to(bias.dtype)


class GeLUFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, bias):
        ctx.save_for_backward(input, bias)
        return result_of_function(bias_gelu(input, bias))

    @staticmethod
    def backward(ctx, grad_output):
        return bias_gelu_back(grad_output, *ctx.saved_tensors)


class FastGeLUFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input):
        ctx.save_for_backward(input)
        return result_of_function(gelu_fwd(input))

    @staticmethod
    def backward(ctx, grad_output):
        return gelu_bwd(grad_output, *ctx.saved_tensors)


def relu_bwd(g: Tensor, x: Tensor) -> Tensor:
    """-> the gradient of relu's x: g where x >= 0, as upstream has it at 0."""
    return torch.where(x >= 0, g, 0.0).to(x.dtype)


def sqrelu_fwd(x: Tensor) -> Tensor:
    """relu(x)^2 (So et al., arXiv 2109.08668)."""
    return F.relu(x).square()


def sqrelu_bwd(g: Tensor, x: Tensor) -> Tensor:
    """-> the gradient of x, in x's dtype."""
    g, wide = _wide(g, x)
    return (2.0 * g * F.relu(wide)).to(x.dtype)


def _in_blocks(function, inputs: tuple[Tensor, ...], count: int) -> tuple[Tensor, ...]:
    """The `count` results of function(*inputs), computed in fp32 or fp64 and rounded to the dtypes of the first inputs.

    All have one shape. What is in 16 bits goes through in blocks of rows.
    """
    if not any(t.dtype in (torch.float16, torch.bfloat16) for t in inputs):
        return function(*inputs)
    results = tuple(t.new_empty(t.shape) for t in inputs[:count])
    into = [t.view(-1, t.shape[-1]) if t.dim() else t.view(1, 1) for t in results]
    rows = [t.reshape(into[0].shape) for t in inputs]
    for block in row_blocks(*into[0].shape, into[0].device):
        for out, value in zip(into, function(*_wide(*(t[block] for t in rows))), strict=True):
            out[block] = value
    return results


def _swiglu(x: Tensor, y: Tensor) -> tuple[Tensor]:
    return (F.silu(x).mul_(y),)


def _swiglu_gradients(x: Tensor, y: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.aten.silu_backward(g * y, x), F.silu(x).mul_(g)


def _check_gate(x: Tensor, y: Tensor) -> None:
    if x.shape != y.shape:
        raise InvalidArgument(f"y: expected x's shape, {tuple(x.shape)}, got {tuple(y.shape)}")


def swiglu_fwd(x: Tensor, y: Tensor) -> Tensor:
    """x, y (...) -> silu(x) * y (Shazeer, arXiv 2002.05202), in x's dtype."""
    _check_gate(x, y)
    return _in_blocks(_swiglu, (x, y), 1)[0]


def swiglu_bwd(x: Tensor, y: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """-> the gradients of x and y, in their dtypes."""
    _check_gate(x, y)
    return _in_blocks(_swiglu_gradients, (x, y, g), 2)


class SwiGLUFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(x, y)
        return result_of_function(swiglu_fwd(x, y))

    @staticmethod
    def backward(ctx, dout):
        return swiglu_bwd(*ctx.saved_tensors, dout)


bias_gelu_impl = GeLUFunction.apply
fast_gelu_impl = FastGeLUFunction.apply
swiglu = SwiGLUFunction.apply
