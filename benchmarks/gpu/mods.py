"""Functions of scores and masks, as flash_attn.cute and FlexAttention take them both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from cells import Cell


@dataclass(frozen=True)
class Mod:
    """What a cell computes beside plain attention."""

    score: Callable | None = None
    mask: Callable | None = None
    lists: bool = False  # of the blocks that the mask sees; FlexAttention has no masks without
    option: dict | None = None  # of flash_attn_func, where one says the same


DOCUMENTS = 8  # of equal lengths in a sequence
SEEN = {"causal": 0.5, "causal, lists": 0.5, "documents, lists": 1 / DOCUMENTS}  # of all scores
NAMES = ("causal", "causal, lists", "documents, lists", "alibi", "softcap")


def _causal(b, h, i, j):
    return i >= j


def of(cell: Cell, device: str) -> Mod:
    """Its tables are made here, once."""
    if cell.mod.startswith("causal"):
        return Mod(mask=_causal, lists="lists" in cell.mod, option={"causal": True})
    if cell.mod.startswith("documents"):
        document = torch.arange(cell.seqlen, device=device) * DOCUMENTS // cell.seqlen
        return Mod(mask=lambda b, h, i, j: document[i] == document[j], lists=True)
    if cell.mod == "alibi":
        slopes = 2.0 ** (-8 * torch.arange(1, cell.nheads + 1, device=device) / cell.nheads)
        return Mod(score=lambda s, b, h, i, j: s - slopes[h] * (i - j).abs(), option={"alibi_slopes": slopes})
    if cell.mod == "softcap":
        return Mod(score=lambda s, b, h, i, j: 20 * torch.tanh(s / 20), option={"softcap": 20.0})
    raise ValueError(f"mod: expected one of {', '.join(NAMES)}, got {cell.mod!r}")
