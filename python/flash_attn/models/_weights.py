"""Renaming of weights."""

from __future__ import annotations

import re

import torch.nn.functional as F
from torch import Tensor


def renamed(state_dict: dict[str, Tensor], *rules: tuple[str, str]) -> dict[str, Tensor]:
    """The same weights; each rule (pattern, replacement) applies to names from their beginning."""
    result = {}
    for name, x in state_dict.items():
        for pattern, replacement in rules:
            name = re.sub("^" + pattern, replacement, name)
        result[name] = x
    return result


def padded_size(n: int, config) -> int:
    """n, rounded up to config.pad_vocab_size_multiple (default 1)."""
    multiple = getattr(config, "pad_vocab_size_multiple", 1)
    return -(-n // multiple) * multiple


def padded_rows(x: Tensor, rows: int, value: float = 0.0) -> Tensor:
    """x (n, ...) -> (rows, ...)."""
    return F.pad(x, [0, 0] * (x.dim() - 1) + [0, rows - x.shape[0]], value=value)
