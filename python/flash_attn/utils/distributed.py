"""Collectives with gradients, and what tensor and sequence parallelism share. On torch.distributed: Gloo, NCCL, ..."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from flash_attn._errors import InvalidArgument
from flash_attn._tensors import result_of_function

__all__ = [
    "AllGatherFunc",
    "AllReduceFunc",
    "ReduceScatterFunc",
    "all_gather",
    "all_gather_raw",
    "all_reduce",
    "all_reduce_raw",
    "allreduce_sequence_parallel_grad",
    "get_dim_for_local_rank",
    "reduce_scatter",
    "reduce_scatter_raw",
    "sync_shared_params",
]

# Their names since torch 2.13, and before.
_all_gather = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or getattr(dist, "reduce_scatter_tensor", None)


def all_gather_raw(input_: Tensor, process_group: dist.ProcessGroup, async_op: bool = False):
    """input_ (n, ...) -> (world size * n, ...) in the order of ranks, and the handle if async_op. No gradient."""
    world = dist.get_world_size(process_group)
    output = input_.new_empty((world * input_.shape[0], *input_.shape[1:]))
    handle = _all_gather(output, input_.contiguous(), group=process_group, async_op=async_op)
    return output, handle


def reduce_scatter_raw(input_: Tensor, process_group: dist.ProcessGroup, async_op: bool = False):
    """input_ (world size * n, ...) -> this rank's (n, ...) of the sum over processes, and the handle. No gradient."""
    world = dist.get_world_size(process_group)
    if input_.shape[0] % world:
        raise InvalidArgument(f"input_: expected a multiple of {world} rows, the world size, got {input_.shape[0]}")
    output = input_.new_empty((input_.shape[0] // world, *input_.shape[1:]))
    handle = _reduce_scatter(output, input_.contiguous(), group=process_group, async_op=async_op)
    return output, handle


def all_reduce_raw(input_: Tensor, process_group: dist.ProcessGroup, async_op: bool = False):
    """-> the sum over processes, written over input_ where that is contiguous, and the handle. No gradient."""
    input_ = input_.contiguous()
    handle = dist.all_reduce(input_, group=process_group, async_op=async_op)
    return input_, handle


class AllGatherFunc(torch.autograd.Function):
    """Its gradient is summed over processes and scattered."""

    @staticmethod
    def forward(ctx, input_: Tensor, process_group: dist.ProcessGroup) -> Tensor:
        ctx.process_group = process_group
        return result_of_function(all_gather_raw(input_, process_group)[0])

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        return reduce_scatter_raw(grad_output, ctx.process_group)[0], None


class ReduceScatterFunc(torch.autograd.Function):
    """Its gradient is gathered."""

    @staticmethod
    def forward(ctx, input_: Tensor, process_group: dist.ProcessGroup) -> Tensor:
        ctx.process_group = process_group
        return result_of_function(reduce_scatter_raw(input_, process_group)[0])

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        return all_gather_raw(grad_output, ctx.process_group)[0], None


class AllReduceFunc(torch.autograd.Function):
    """The sum over processes, of whose gradient every process gets its own: the same on all of them."""

    @staticmethod
    def forward(ctx, input_: Tensor, process_group: dist.ProcessGroup) -> Tensor:
        return result_of_function(all_reduce_raw(input_.clone(), process_group)[0])

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        return grad_output, None


all_gather = AllGatherFunc.apply
reduce_scatter = ReduceScatterFunc.apply
all_reduce = AllReduceFunc.apply


def _marked(model: torch.nn.Module, mark: str) -> list[torch.nn.Parameter]:
    """Parameters with an attribute `mark`, by name: in the same order on ranks that have some of their own."""
    return [p for _, p in sorted(model.named_parameters()) if getattr(p, mark, False)]


def sync_shared_params(model: torch.nn.Module, process_group: dist.ProcessGroup) -> None:
    """Gives all ranks rank 0's values of the parameters that are marked `_shared_params`."""
    with torch.no_grad():
        for p in _marked(model, "_shared_params"):
            dist.broadcast(p, src=dist.get_global_rank(process_group, 0), group=process_group)


def allreduce_sequence_parallel_grad(model: torch.nn.Module, process_group: dist.ProcessGroup) -> None:
    """Sums over ranks the gradients of the parameters that are marked `_sequence_parallel`, in one message."""
    grads = [p.grad for p in _marked(model, "_sequence_parallel")]
    if not grads:
        return
    with torch.no_grad():
        together = torch.cat([g.reshape(-1) for g in grads])
        dist.all_reduce(together, group=process_group)
        for g, summed in zip(grads, together.split([g.numel() for g in grads]), strict=True):
            g.copy_(summed.view_as(g))


def get_dim_for_local_rank(dim: int, world_size: int, local_rank: int, multiple_of: int = 1) -> int:
    """-> this rank's share of dim in units of `multiple_of`: the first ranks get what is left over."""
    share, left = divmod(dim // multiple_of, world_size)
    return (share + (local_rank < left)) * multiple_of
