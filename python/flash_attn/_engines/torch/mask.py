"""Every structured mask is one interval per row: query row i sees keys [lo(i), hi(i)), and lo and hi never decrease."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from flash_attn._engines.torch.sequences import Sequences, at_least, at_most, column, positions


class Mask:
    def __init__(self, p, s: Sequences, max_seqlen_k: int):
        self.left, self.right, self.chunk = p.window_left, p.window_right, p.chunk
        self.q, self.k = s.q, s.k
        self.max_seqlen_k = max_seqlen_k
        self.known = isinstance(s.q.length, int) and isinstance(s.k.length, int)  # lengths, to the host

    @property
    def structured(self) -> bool:
        """Whether rows of one sequence see different keys."""
        return self.left >= 0 or self.right >= 0 or self.chunk > 0

    def _interval(self, position, seqlen_k):
        """-> lo, hi of rows that stand at key `position`: ints, or tensors of the shapes that these have together."""
        lo, hi = position * 0, position * 0 + seqlen_k
        if self.left >= 0:
            lo = at_least(lo, position - self.left)
        if self.right >= 0:
            hi = at_most(hi, position + self.right + 1)
        if self.chunk > 0:
            first = position // self.chunk * self.chunk
            lo, hi = at_least(lo, first), at_most(hi, first + self.chunk)
        lo = at_most(lo, seqlen_k)
        return lo, at_least(hi, lo)

    def position(self, b: slice, i: slice) -> Tensor:
        """(C or 1, R): the key position of rows `i`; the last query is aligned with the last key."""
        return positions(i, self.q.device)[None] + (column(self.k.length, b) - column(self.q.length, b))

    def intervals(self, b: slice, i: slice) -> tuple[Tensor, Tensor]:
        """lo, hi (C or 1, R) of rows `i`; rows that a sequence lacks see nothing."""
        lo, hi = self._interval(self.position(b, i), column(self.k.length, b))
        valid = self.q.valid(b, i)
        return lo, hi if valid is None else torch.where(valid, hi, lo)

    def tiles(self, i: slice, keys: int) -> Iterator[tuple[slice, bool]]:
        """Blocks of at most `keys` keys that rows `i` may see, and whether every row sees all of the block.

        Blocks start at multiples of `keys`. What the host does not know, masks decide: no block is skipped or full.
        """
        for start in range(0, self.max_seqlen_k, keys):
            j = slice(start, min(start + keys, self.max_seqlen_k))
            if not self.known:
                yield j, False
                continue
            shift = self.k.length - self.q.length
            first = self._interval(i.start + shift, self.k.length)
            last = self._interval(i.stop - 1 + shift, self.k.length)
            if first[0] < j.stop and j.start < last[1]:
                yield j, last[0] <= j.start and j.stop <= first[1]


def visible(intervals: tuple[Tensor, Tensor], j: slice) -> Tensor:
    """(C or 1, 1, R, N): whether a row sees keys `j`."""
    lo, hi = (x[:, None, :, None] for x in intervals)
    key = positions(j, lo.device)
    return (key >= lo) & (key < hi)
