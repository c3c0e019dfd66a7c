"""The MLP with a squared ReLU (So et al., arXiv 2109.08668): ops.fused_dense under upstream's older name."""

from __future__ import annotations

from torch import nn

from flash_attn._errors import NotServed
from flash_attn.ops.fused_dense import fused_mlp_func

__all__ = ["FusedDenseSqreluDense", "FusedDenseSqreluDenseFunc", "fused_dense_sqrelu_dense_function"]


def fused_dense_sqrelu_dense_function(x, weight1, bias1, weight2, bias2, checkpoint_lvl=0):
    """relu(x @ weight1' + bias1)^2 @ weight2' + bias2; checkpoint_lvl as of fused_mlp_func."""
    return fused_mlp_func(
        x, weight1, weight2, bias1, bias2, activation="sqrelu", checkpoint_lvl=checkpoint_lvl, heuristic=-1
    )


class FusedDenseSqreluDenseFunc:
    """`apply` as of upstream's autograd function."""

    apply = staticmethod(fused_dense_sqrelu_dense_function)


class FusedDenseSqreluDense(nn.Module):
    """The function with its parameters, fc1 and fc2; hidden_features is 4 * in_features if not given."""

    def __init__(
        self,
        in_features,
        hidden_features=None,
        out_features=None,
        bias1=True,
        bias2=True,
        checkpoint_lvl=0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if not (bias1 and bias2):
            raise NotServed("FusedDenseSqreluDense has both biases; ops.fused_dense.FusedMLP serves none, too")
        self.checkpoint_lvl = checkpoint_lvl
        hidden_features = hidden_features or 4 * in_features
        self.fc1 = nn.Linear(in_features, hidden_features, device=device, dtype=dtype)
        self.fc2 = nn.Linear(hidden_features, out_features or in_features, device=device, dtype=dtype)

    def forward(self, x):
        return fused_dense_sqrelu_dense_function(
            x, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias, self.checkpoint_lvl
        )
