"""Feed-forward layers: plain, gated, and split over the processes of a group."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from flash_attn._errors import InvalidArgument
from flash_attn.ops.activations import swiglu
from flash_attn.ops.fused_dense import ColumnParallelLinear, FusedMLP, ParallelFusedMLP, RowParallelLinear

__all__ = [
    "ColumnParallelLinear",
    "FusedMLP",
    "GatedMlp",
    "Mlp",
    "ParallelFusedMLP",
    "ParallelGatedMlp",
    "ParallelMLP",
    "RowParallelLinear",
]


class Mlp(nn.Module):
    """fc2(activation(fc1(x))); hidden_features: default 4 * in_features. return_residual: also returns x."""

    def __init__(
        self,
        in_features,
        hidden_features=None,
        out_features=None,
        activation=F.gelu,
        bias1=True,
        bias2=True,
        return_residual=False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        kind = {"device": device, "dtype": dtype}
        hidden_features = 4 * in_features if hidden_features is None else hidden_features
        out_features = in_features if out_features is None else out_features
        self.return_residual = return_residual
        self.fc1 = nn.Linear(in_features, hidden_features, bias=bias1, **kind)
        self.activation = activation
        self.fc2 = nn.Linear(hidden_features, out_features, bias=bias2, **kind)

    def forward(self, x):
        y = self.fc2(self.activation(self.fc1(x)))
        return (y, x) if self.return_residual else y


class ParallelMLP(nn.Module):
    """Mlp: each process of the group has some of the hidden features."""

    def __init__(
        self,
        in_features,
        hidden_features=None,
        out_features=None,
        activation=F.gelu,
        process_group: ProcessGroup = None,
        sequence_parallel=True,
        bias1=True,
        bias2=True,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if process_group is None:
            raise InvalidArgument("process_group: expected one, got None")
        common = dict(sequence_parallel=sequence_parallel, device=device, dtype=dtype)
        hidden_features = 4 * in_features if hidden_features is None else hidden_features
        out_features = in_features if out_features is None else out_features
        self.fc1 = ColumnParallelLinear(in_features, hidden_features, process_group, bias=bias1, **common)
        self.activation = activation
        self.fc2 = RowParallelLinear(hidden_features, out_features, process_group, bias=bias2, **common)

    def forward(self, x):
        return self.fc2(self.activation(self.fc1(x)))


def _gated_features(in_features: int, hidden_features: int | None, multiple_of: int) -> int:
    """As many weights as an Mlp has with 4 * in_features, unless told otherwise; rounded up."""
    hidden_features = int(8 * in_features / 3) if hidden_features is None else hidden_features
    return -(-hidden_features // multiple_of) * multiple_of


def _gated(y: Tensor, activation) -> Tensor:
    """y (..., 2 * hidden): values, then gates -> values * activation(gates)."""
    if activation == F.sigmoid:
        return F.glu(y, dim=-1)
    values, gates = y.chunk(2, dim=-1)
    return swiglu(gates, values) if activation == F.silu else values * activation(gates)


class GatedMlp(nn.Module):
    """fc2(values * activation(gates)), [values, gates] = fc1(x) (Shazeer, arXiv 2002.05202): sigmoid is GLU, silu
    SwiGLU. hidden_features: default 8/3 * in_features; rounded up to multiple_of."""

    def __init__(
        self,
        in_features,
        hidden_features=None,
        out_features=None,
        activation=F.sigmoid,
        bias1=True,
        bias2=True,
        multiple_of=128,
        return_residual=False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        kind = {"device": device, "dtype": dtype}
        hidden_features = _gated_features(in_features, hidden_features, multiple_of)
        out_features = in_features if out_features is None else out_features
        self.return_residual = return_residual
        self.fc1 = nn.Linear(in_features, 2 * hidden_features, bias=bias1, **kind)
        self.activation = activation
        self.fc2 = nn.Linear(hidden_features, out_features, bias=bias2, **kind)

    def forward(self, x):
        y = self.fc2(_gated(self.fc1(x), self.activation))
        return (y, x) if self.return_residual else y


class ParallelGatedMlp(nn.Module):
    """GatedMlp: each process of the group has some of the hidden features, values and gates."""

    def __init__(
        self,
        in_features,
        process_group,
        hidden_features=None,
        out_features=None,
        activation=F.sigmoid,
        bias1=True,
        bias2=True,
        multiple_of=128,
        sequence_parallel=True,
        device=None,
        dtype=None,
    ):
        super().__init__()
        common = dict(sequence_parallel=sequence_parallel, device=device, dtype=dtype)
        hidden_features = _gated_features(in_features, hidden_features, multiple_of)
        out_features = in_features if out_features is None else out_features
        self.fc1 = ColumnParallelLinear(in_features, 2 * hidden_features, process_group, bias=bias1, **common)
        self.activation = activation
        self.fc2 = RowParallelLinear(hidden_features, out_features, process_group, bias=bias2, **common)

    def forward(self, x):
        return self.fc2(_gated(self.fc1(x), self.activation))
