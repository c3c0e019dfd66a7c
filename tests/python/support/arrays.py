"""NumPy's and JAX's arrays as tensors, bit by bit, for the comparisons of compare.py."""

from __future__ import annotations

import numpy as np
import torch


def tensor(x) -> torch.Tensor:
    """A CPU tensor with the values and dtype of a NumPy or JAX array; bfloat16 (of ml_dtypes) too."""
    x = np.array(x)
    if str(x.dtype) == "bfloat16":
        return torch.from_numpy(x.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(x)


def numpy_array(x: torch.Tensor) -> np.ndarray:
    """The reverse; bfloat16 needs ml_dtypes."""
    if x.dtype != torch.bfloat16:
        return x.detach().numpy().copy()
    import ml_dtypes

    return x.detach().view(torch.uint16).numpy().copy().view(ml_dtypes.bfloat16)
