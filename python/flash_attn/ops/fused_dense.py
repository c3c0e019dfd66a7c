"""Linear layers and two-layer MLPs, alone or with weights split over processes (Shoeybi et al., arXiv 1909.08053).

Sequence parallelism (Korthikanti et al., arXiv 2205.05198): a process holds a part of the tokens (dimension 0) outside
of the parallel layers. They are gathered before a column-parallel layer, again in its backward rather than kept, and
summed and scattered after a row-parallel one.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from flash_attn._errors import InvalidArgument
from flash_attn.ops._linear import linear_dtype, parameter_gradients
from flash_attn.ops.activations import sqrelu_fwd
from flash_attn.utils.distributed import (
    all_gather_raw,
    all_reduce,
    all_reduce_raw,
    get_dim_for_local_rank,
    reduce_scatter,
    reduce_scatter_raw,
)

__all__ = [
    "ColumnParallelLinear",
    "FusedDense",
    "FusedDenseFunc",
    "FusedMLP",
    "FusedMLPFunc",
    "ParallelFusedMLP",
    "RowParallelLinear",
    "fused_dense_func",
    "fused_mlp_func",
]

_ACTIVATIONS = {"gelu_approx": partial(F.gelu, approximate="tanh"), "relu": F.relu, "sqrelu": sqrelu_fwd}


class _ColumnParallel(torch.autograd.Function):
    """x @ weight' + bias with this process's rows of the weight. The gradient of x is summed over processes."""

    @staticmethod
    def forward(ctx, x, weight, bias, process_group, sequence_parallel):
        ctx.process_group, ctx.sequence_parallel = process_group, sequence_parallel
        dtype = linear_dtype(x)
        total = x = x.to(dtype)
        if sequence_parallel:
            total, _ = all_gather_raw(x, process_group)
        ctx.save_for_backward(x, weight, bias)
        return F.linear(total, weight.to(dtype), None if bias is None else bias.to(dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        total, weight, bias = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        gathering = dx = summing = dweight = dbias = None
        if needs_weight and ctx.sequence_parallel:  # meanwhile the gradient of x is computed
            total, gathering = all_gather_raw(total, ctx.process_group, async_op=True)
        if needs_x:
            reduce = reduce_scatter_raw if ctx.sequence_parallel else all_reduce_raw
            dx, summing = reduce(dout @ weight.to(dout.dtype), ctx.process_group, async_op=True)
        if needs_weight or needs_bias:
            if gathering is not None:
                gathering.wait()
            if needs_weight:
                dweight, dbias = parameter_gradients(dout, total, weight, bias)
            else:
                dbias = dout.flatten(0, -2).sum(0, dtype=torch.float32).to(bias.dtype)
        if summing is not None:
            summing.wait()
        return dx, dweight, dbias, None, None


def fused_dense_func(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    return_residual: bool = False,
    process_group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = True,
):
    """x (..., in_features) @ weight' + bias -> (..., out_features) [, x if return_residual].

    weight (out_features, in_features), bias (out_features).

    process_group: weight and bias are this process's rows. With sequence_parallel x is its part of the tokens, along
    dimension 0, and the result has all of them; else x is the same on all processes.
    """
    if process_group is None:
        out = F.linear(x, weight, bias)
    else:
        out = _ColumnParallel.apply(x, weight, bias, process_group, sequence_parallel)
    return (out, x) if return_residual else out


class FusedDenseFunc:
    """`apply` as of upstream's autograd function."""

    apply = staticmethod(fused_dense_func)


class FusedDense(nn.Linear):
    """A linear layer; return_residual: also returns its input."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        return_residual: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.return_residual = return_residual

    def forward(self, x, process_group=None):
        return fused_dense_func(
            x, self.weight, self.bias, return_residual=self.return_residual, process_group=process_group
        )


def _share(name: str, features: int, process_group: dist.ProcessGroup, multiple_of: int) -> int:
    if features % multiple_of:
        raise InvalidArgument(f"{name}: expected a multiple of {multiple_of}, got {features}")
    world, rank = dist.get_world_size(process_group), dist.get_rank(process_group)
    return get_dim_for_local_rank(features, world, rank, multiple_of)


class ColumnParallelLinear(nn.Linear):
    """This process's share of the output features, in units of `multiple_of`; see fused_dense_func."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        process_group: dist.ProcessGroup,
        bias: bool = True,
        sequence_parallel=True,
        multiple_of=1,
        device=None,
        dtype=None,
    ) -> None:
        share = _share("out_features", out_features, process_group, multiple_of)
        super().__init__(in_features, share, bias=bias, device=device, dtype=dtype)
        self.process_group, self.sequence_parallel = process_group, sequence_parallel

    def forward(self, x):
        return fused_dense_func(
            x, self.weight, self.bias, process_group=self.process_group, sequence_parallel=self.sequence_parallel
        )


class RowParallelLinear(nn.Linear):
    """This process's share of the input features; rank 0 has the bias. The results are summed over processes.

    x (tokens, ..., its share) -> this process's part of the tokens with sequence_parallel, else all of them.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        process_group: dist.ProcessGroup,
        bias: bool = True,
        sequence_parallel=True,
        multiple_of=1,
        device=None,
        dtype=None,
    ) -> None:
        share = _share("in_features", in_features, process_group, multiple_of)
        first = dist.get_rank(process_group) == 0
        super().__init__(share, out_features, bias=bias and first, device=device, dtype=dtype)
        self.process_group, self.sequence_parallel = process_group, sequence_parallel

    def forward(self, x):
        out = fused_dense_func(x, self.weight, self.bias)
        return (reduce_scatter if self.sequence_parallel else all_reduce)(out, self.process_group)


def _check_mlp(activation: str, checkpoint_lvl: int, heuristic: int | str) -> None:
    if activation not in _ACTIVATIONS:
        raise InvalidArgument(f"activation: expected one of {sorted(_ACTIVATIONS)}, got {activation!r}")
    if checkpoint_lvl not in (0, 1, 2):
        raise InvalidArgument(f"checkpoint_lvl: expected 0, 1 or 2, got {checkpoint_lvl}")
    if heuristic not in ("auto", -1, 0, 1, 2, 3, 4):
        raise InvalidArgument(f"heuristic: expected 'auto' or -1 to 4, got {heuristic!r}")


def fused_mlp_func(
    x: Tensor,
    weight1: Tensor,
    weight2: Tensor,
    bias1: Tensor | None = None,
    bias2: Tensor | None = None,
    activation: str = "gelu_approx",
    save_pre_act: bool = True,
    return_residual: bool = False,
    checkpoint_lvl: int = 0,
    heuristic: int = 0,
    process_group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = True,
):
    """activation(x @ weight1' + bias1) @ weight2' + bias2 [, x if return_residual].

    x (..., in_features), weight1 (hidden, in_features), weight2 (out_features, hidden). activation: "gelu_approx",
    "relu" or "sqrelu". checkpoint_lvl: 0 keeps all for the backward, 1 computes the activation again, 2 the first
    layer, too, as does save_pre_act=False. heuristic: accepted; there is nothing to choose here. process_group: weight1
    and bias1 are this process's rows and weight2 its columns; the results are yet to be summed.
    """
    _check_mlp(activation, checkpoint_lvl, heuristic)

    def first(x):
        return fused_dense_func(x, weight1, bias1, process_group=process_group, sequence_parallel=sequence_parallel)

    def second(pre_act):
        return F.linear(_ACTIVATIONS[activation](pre_act), weight2, bias2)

    if not torch.is_grad_enabled():
        out = second(first(x))
    elif checkpoint_lvl == 2 or not save_pre_act:
        out = checkpoint(lambda x: second(first(x)), x, use_reentrant=False, preserve_rng_state=False)
    elif checkpoint_lvl == 1:
        out = checkpoint(second, first(x), use_reentrant=False, preserve_rng_state=False)
    else:
        out = second(first(x))
    return (out, x) if return_residual else out


class FusedMLPFunc:
    """`apply` as of upstream's autograd function: each bias behind its weight."""

    @staticmethod
    def apply(
        x, weight1, bias1, weight2, bias2, activation="gelu_approx", save_pre_act=True, return_residual=False,
        checkpoint_lvl=0, heuristic=0, process_group=None, sequence_parallel=True,
    ):  # fmt: skip
        return fused_mlp_func(
            x, weight1, weight2, bias1, bias2, activation, save_pre_act, return_residual, checkpoint_lvl, heuristic,
            process_group, sequence_parallel,
        )  # fmt: skip


class FusedMLP(nn.Module):
    """fused_mlp_func with its parameters, fc1 and fc2."""

    def __init__(
        self,
        in_features,
        hidden_features=None,
        out_features=None,
        bias1=True,
        bias2=True,
        activation="gelu_approx",
        return_residual=False,
        checkpoint_lvl=0,
        heuristic="auto",
        device=None,
        dtype=None,
    ):
        super().__init__()
        _check_mlp(activation, checkpoint_lvl, heuristic)
        self.activation, self.return_residual = activation, return_residual
        self.checkpoint_lvl, self.heuristic = checkpoint_lvl, heuristic
        hidden_features = 4 * in_features if hidden_features is None else hidden_features
        out_features = in_features if out_features is None else out_features
        self.fc1 = nn.Linear(in_features, hidden_features, bias=bias1, device=device, dtype=dtype)
        self.fc2 = nn.Linear(hidden_features, out_features, bias=bias2, device=device, dtype=dtype)

    def forward(self, x, process_group=None):
        """process_group: sequence parallelism; x and the result are this process's part of the tokens."""
        out = fused_mlp_func(
            x,
            self.fc1.weight,
            self.fc2.weight,
            self.fc1.bias,
            self.fc2.bias,
            activation=self.activation,
            save_pre_act=self.training,
            checkpoint_lvl=self.checkpoint_lvl,
            heuristic=self.heuristic,
            process_group=process_group,
        )
        if process_group is not None:
            out = reduce_scatter(out, process_group)
        return (out, x) if self.return_residual else out


class ParallelFusedMLP(nn.Module):
    """A column-parallel and a row-parallel layer with an activation between."""

    def __init__(
        self,
        in_features,
        hidden_features=None,
        out_features=None,
        activation="gelu_approx",
        process_group: dist.ProcessGroup = None,
        bias1=True,
        bias2=True,
        sequence_parallel=True,
        checkpoint_lvl=0,
        heuristic="auto",
        device=None,
        dtype=None,
    ):
        super().__init__()
        _check_mlp(activation, checkpoint_lvl, heuristic)
        if process_group is None:
            raise InvalidArgument("process_group: expected one, got None")
        self.activation, self.checkpoint_lvl, self.heuristic = activation, checkpoint_lvl, heuristic
        self.process_group, self.sequence_parallel = process_group, sequence_parallel
        hidden_features = 4 * in_features if hidden_features is None else hidden_features
        out_features = in_features if out_features is None else out_features
        common = dict(sequence_parallel=sequence_parallel, device=device, dtype=dtype)
        self.fc1 = ColumnParallelLinear(in_features, hidden_features, process_group, bias=bias1, **common)
        self.fc2 = RowParallelLinear(hidden_features, out_features, process_group, bias=bias2, **common)

    def forward(self, x):
        out = fused_mlp_func(
            x,
            self.fc1.weight,
            self.fc2.weight,
            self.fc1.bias,
            self.fc2.bias,
            activation=self.activation,
            save_pre_act=self.training,
            checkpoint_lvl=self.checkpoint_lvl,
            heuristic=self.heuristic,
            process_group=self.process_group,
            sequence_parallel=self.sequence_parallel,
        )
        return (reduce_scatter if self.sequence_parallel else all_reduce)(out, self.process_group)
