"""How much is worked on at once: sequences x rows x keys, so that no temporary has much more than ELEMENTS elements."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

ELEMENTS = 1 << 23  # 32 MiB in fp32; about ten such temporaries live at a time
ROWS, KEYS = 512, 512


@dataclass(frozen=True)
class Blocks:
    batch: int
    rows: int
    keys: int  # a multiple of 8, as dropout draws eight keys at a time


def block_sizes(p, elements: int = ELEMENTS) -> Blocks:
    """A function of shapes alone, and so is every bit of the results."""
    widest = max(p.headdim, p.headdim_v)
    rows, keys = max(1, min(p.max_seqlen_q, ROWS)), max(8, min(-(-p.max_seqlen_k // 8) * 8, KEYS))

    def size() -> int:
        """The largest temporary of one sequence: its scores, its queries or its keys."""
        return max(p.nheads * rows * max(keys, widest), p.nheads_k * keys * widest)

    while size() > elements and (rows > 16 or keys > 64):
        if rows > 16:
            rows = max(16, rows // 2)
        else:
            keys = max(64, keys // 16 * 8)
    of_dq = p.nheads * p.max_seqlen_q * p.headdim if p.is_backward else 0  # summed over all keys, so for all rows
    return Blocks(max(1, min(p.batch, elements // max(size(), of_dq))), rows, keys)


def listed_sizes(blocks: Blocks, lists) -> Blocks:
    """Blocks none of which lies in two of the listed ones (`mods.BlockLists`): these decide what is computed."""
    rows, keys = lists.size
    while rows > blocks.rows and rows % 2 == 0:
        rows //= 2
    while keys > blocks.keys and keys % 2 == 0:
        keys //= 2
    return Blocks(1 if lists.kinds.shape[0] > 1 else blocks.batch, rows, keys)


def slices(n: int, step: int) -> Iterator[slice]:
    for start in range(0, n, step):
        yield slice(start, min(start + step, n))
