"""What is split over processes equals what is not: two of them, over Gloo."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from flash_attn.losses.cross_entropy import CrossEntropyLoss
from flash_attn.ops.fused_dense import ColumnParallelLinear, FusedMLP, ParallelFusedMLP, RowParallelLinear
from flash_attn.ops.triton.cross_entropy import cross_entropy_loss
from flash_attn.utils import distributed as D
from support.processes import in_processes

WORLD = 2


def same(a: torch.Tensor, b: torch.Tensor) -> None:
    assert torch.allclose(a, b, rtol=0, atol=1e-12), float((a - b).abs().max())


def collectives(rank: int, group) -> None:
    x = torch.arange(6, dtype=torch.float64).view(2, 3) + 10 * rank
    x.requires_grad_()
    both = torch.stack([torch.arange(6, dtype=torch.float64).view(2, 3) + 10 * r for r in range(WORLD)])
    y = D.all_gather(x, group)
    same(y, both.flatten(0, 1))
    weight = torch.arange(12, dtype=torch.float64).view(4, 3) * (rank + 1)
    (g,) = torch.autograd.grad((y * weight).sum(), x)
    same(g, 3 * torch.arange(12, dtype=torch.float64).view(4, 3)[2 * rank : 2 * rank + 2])
    y = D.reduce_scatter(x, group)
    same(y, both.sum(0)[rank : rank + 1])
    (g,) = torch.autograd.grad((y * (rank + 1)).sum(), x)
    same(g, torch.tensor([1.0, 2.0], dtype=torch.float64)[:, None].expand(2, 3))
    before = x.detach().clone()
    y = D.all_reduce(x * 1, group)
    same(y, both.sum(0))
    same(x, before)
    (g,) = torch.autograd.grad((y * 5).sum(), x)
    same(g, torch.full((2, 3), 5.0, dtype=torch.float64))
    with pytest.raises(ValueError, match="input_: expected a multiple of 2 rows"):
        D.reduce_scatter_raw(x[:1], group)


def parameters(rank: int, group) -> None:
    model = torch.nn.Linear(2, 2).double()
    with torch.no_grad():
        model.weight.fill_(rank + 1.0)
        model.bias.fill_(rank + 1.0)
    model.weight._shared_params = True
    D.sync_shared_params(model, group)
    same(model.weight, torch.ones_like(model.weight))
    same(model.bias, torch.full_like(model.bias, rank + 1.0))
    for p in model.parameters():
        p.grad = torch.full_like(p, rank + 1.0)
    model.bias._sequence_parallel = True
    D.allreduce_sequence_parallel_grad(model, group)
    same(model.bias.grad, torch.full_like(model.bias, 3.0))
    same(model.weight.grad, torch.full_like(model.weight, rank + 1.0))


def vocabulary(rank: int, group) -> None:
    torch.manual_seed(0)
    logits = (3 * torch.randn(9, 16, dtype=torch.float64)).requires_grad_()
    labels = torch.randint(0, 16, (9,))
    labels[4] = -100
    own = slice(8 * rank, 8 * rank + 8)
    for smoothing, scale, z_scale, inplace in ((0.0, 1.0, 0.0, False), (0.1, 0.7, 0.1, True)):
        options = dict(label_smoothing=smoothing, logit_scale=scale, lse_square_scale=z_scale)
        mine = logits[:, own].detach().clone().requires_grad_()
        loss, z = cross_entropy_loss(mine * 1, labels, **options, inplace_backward=inplace, process_group=group)
        exact, exact_z = cross_entropy_loss(logits, labels, **options)
        same(loss, exact)
        same(z, exact_z)
        weight = torch.arange(9, dtype=torch.float64)
        (g,) = torch.autograd.grad((loss * weight).sum(), mine)
        (exact_g,) = torch.autograd.grad((exact * weight).sum(), logits)
        same(g, exact_g[:, own])
    same(CrossEntropyLoss(process_group=group)(logits[:, own], labels), CrossEntropyLoss()(logits, labels))
    with pytest.raises(ValueError, match="labels: expected 0 to 15"):
        cross_entropy_loss(logits[:, own], labels + 8, process_group=group)


def layers(rank: int, group) -> None:
    """A column-parallel and a row-parallel layer are the MLP of the whole weights, with its gradients."""
    for sequence, level in ((True, 0), (False, 1), (True, 2)):
        torch.manual_seed(1)
        whole = FusedMLP(6, 8, 4).double()
        split = ParallelFusedMLP(
            6, 8, 4, process_group=group, sequence_parallel=sequence, checkpoint_lvl=level
        ).double()
        column = ColumnParallelLinear(6, 8, group, sequence_parallel=sequence).double()
        row = RowParallelLinear(8, 4, group, sequence_parallel=sequence).double()
        own = slice(4 * rank, 4 * rank + 4)
        with torch.no_grad():
            for first, second in ((split.fc1, split.fc2), (column, row)):
                first.weight.copy_(whole.fc1.weight[own])
                first.bias.copy_(whole.fc1.bias[own])
                second.weight.copy_(whole.fc2.weight[:, own])
                assert (second.bias is None) == (rank > 0)
                if second.bias is not None:
                    second.bias.copy_(whole.fc2.bias)
        torch.manual_seed(2)  # the ranks have drawn for parameters of their own
        x = torch.randn(4, 3, 6, dtype=torch.float64, requires_grad=True)
        dout = torch.randn(4, 3, 4, dtype=torch.float64)
        tokens = slice(2 * rank, 2 * rank + 2) if sequence else slice(0, 4)
        exact = whole(x)
        exact_grads = torch.autograd.grad(exact, (x, whole.fc1.weight, whole.fc1.bias, whole.fc2.weight), dout)
        mine = x[tokens].detach().clone().requires_grad_()
        gelu = torch.nn.functional.gelu
        for y, first, second in (
            (split(mine), split.fc1, split.fc2),
            (row(gelu(column(mine), approximate="tanh")), column, row),
        ):
            same(y, exact[tokens])
            # Rank r's part of the sum, of which all_reduce's gradient is on every rank.
            grads = torch.autograd.grad(y, (mine, first.weight, first.bias, second.weight), dout[tokens])
            same(grads[0], exact_grads[0][tokens])
            same(grads[1], exact_grads[1][own])
            same(grads[2], exact_grads[2][own])
            same(grads[3], exact_grads[3][:, own])
    uneven = ColumnParallelLinear(4, 6, group, multiple_of=2)
    assert uneven.out_features == (4 if rank == 0 else 2)
    with pytest.raises(ValueError, match="out_features: expected a multiple of 4, got 6"):
        ColumnParallelLinear(4, 6, group, multiple_of=4)


def worker(rank: int) -> None:
    for part in (collectives, parameters, vocabulary, layers):
        part(rank, dist.group.WORLD)


def test_two_processes(tmp_path):
    in_processes(worker, WORLD, tmp_path)


def test_shares():
    for dim, world, unit in ((12, 4, 1), (13, 4, 1), (24, 3, 8), (40, 3, 8)):
        shares = [D.get_dim_for_local_rank(dim, world, rank, unit) for rank in range(world)]
        assert sum(shares) == dim and max(shares) - min(shares) <= unit and shares == sorted(shares, reverse=True)
