"""Rows in blocks: temporaries in fp32 are as small as a block, whatever the tensor's size."""

from __future__ import annotations

from collections.abc import Iterator

import torch

# Elements of a block: on a CPU what stays in a core's cache, elsewhere what keeps a device busy between two launches.
_CPU, _DEVICE = 1 << 18, 1 << 24


def row_blocks(rows: int, columns: int, device: torch.device) -> Iterator[slice]:
    """Slices that cover `rows` rows of `columns` elements, at least one: an empty sum is a sum, too.

    In a compiled graph one covers all: the compiler makes loops of its own, without temporaries.
    """
    if torch.compiler.is_compiling():
        yield slice(0, rows)
        return
    step = max(1, (_CPU if device.type == "cpu" else _DEVICE) // max(columns, 1))
    for start in range(0, max(rows, 1), step):
        yield slice(start, min(start + step, rows))
