"""Who attends to whom: where the rows of every sequence lie, from the many ways to say it.

Operands are seen as (entry, row, head, col): a packed tensor is the only entry, a page is an entry. Lengths that are
the same for all sequences and known to the host stay Python ints; lengths in tables stay tensors (batch), are never
read by the host, and are clamped: no content leads outside the memory (entries * rows).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

Lengths = int | Tensor  # one for all sequences, or int64 (batch)


def at_most(x: Lengths, y: Lengths) -> Lengths:
    if isinstance(x, Tensor):
        return x.clamp(max=y)
    return y.clamp(max=x) if isinstance(y, Tensor) else min(x, y)


def at_least(x: Lengths, y: Lengths) -> Lengths:
    if isinstance(x, Tensor):
        return x.clamp(min=y)
    return y.clamp(min=x) if isinstance(y, Tensor) else max(x, y)


def clamp(x: Lengths, low: Lengths, high: Lengths) -> Lengths:
    return at_most(at_least(x, low), high)


def column(x: Lengths, b: slice) -> Lengths:
    """The lengths of sequences `b` against rows: (C, 1), or the int."""
    return x[b, None] if isinstance(x, Tensor) else x


def positions(r: slice, device: torch.device) -> Tensor:
    return torch.arange(r.start, r.stop, device=device)


def as_rows(x: Tensor) -> Tensor:
    """(total, heads, cols) -> (1, total, heads, cols); four dimensions stay as they are."""
    return x if x.dim() == 4 else x[None]


def lse_as_rows(x: Tensor) -> Tensor:
    """(batch, heads, rows) or packed (heads, total) -> (entry, row, head, 1)."""
    x = x.transpose(-1, -2)[..., None]
    return x if x.dim() == 4 else x[None]


@dataclass(frozen=True)
class Rows:
    """Rows [0, length) of every sequence, on the side of the queries or of the keys."""

    entries: int  # of the memory
    rows: int  # of an entry
    device: torch.device
    start: Lengths  # of the sequence, in its entry or its run of pages
    length: Lengths
    entry: int | Tensor | None = None  # 0: packed; (batch): cache_batch_idx; None: sequence b lies in entry b
    table: Tensor | None = None  # (batch, max_blocks): the pages of a sequence, rows of one after rows of the other

    @property
    def in_place(self) -> bool:
        """Row i of sequence b is row i of entry b: a slice finds it."""
        return self.table is None and self.entry is None and isinstance(self.start, int) and self.start == 0

    def locate(self, b: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
        """Where row `row` of the entry or the run of pages of sequence b is: entries and rows of the memory."""
        if self.table is not None:
            row = row.clamp(0, self.table.shape[1] * self.rows - 1)
            page = self.table[b, row // self.rows].long()
            return page.clamp(0, self.entries - 1), row % self.rows
        row = row.clamp(0, self.rows - 1)
        if self.entry is None:
            return b, row
        return (self.entry[b] if isinstance(self.entry, Tensor) else torch.zeros_like(b)), row

    def places(self, b: slice, r: slice) -> tuple[Tensor, Tensor]:
        """Rows `r` of sequences `b`: entries (C, 1 or n) and rows (C or 1, n) of the memory."""
        return self.locate(positions(b, self.device)[:, None], column(self.start, b) + positions(r, self.device)[None])

    def valid(self, b: slice, r: slice) -> Tensor | None:
        """(C or 1, n): which of rows `r` the sequences have; None: all."""
        if isinstance(self.length, int) and r.stop <= self.length:
            return None
        return positions(r, self.device)[None] < column(self.length, b)

    def read(self, x: Tensor, b: slice, r: slice) -> Tensor:
        """x (entry, row, head, col) -> (C, n, heads, cols). Rows that a sequence lacks hold anything."""
        return x[b, r] if self.in_place else x[self.places(b, r)]


class Writer:
    """Writes the rows of sequences into `x` (entry, row, head, col); what is no row of a sequence becomes `fill`.

    Rows that a slice does not find are gathered in memory of x's own size with one row more, which takes what is no
    row: no two rows of sequences meet, so nothing is added up and nothing depends on an order.
    """

    def __init__(self, x: Tensor, rows: Rows, fill: float = 0.0):
        self.x, self.rows, self.fill = x, rows, fill
        self.memory = None
        if rows.in_place:
            x.fill_(fill)
        else:
            self.memory = x.new_full((rows.entries * rows.rows + 1, *x.shape[2:]), fill)

    def put(self, b: slice, r: slice, values: Tensor) -> None:
        """`values`: (C, heads, n, cols), rounded here to the dtype of x."""
        values = values.transpose(1, 2).to(self.x.dtype)
        valid = self.rows.valid(b, r)
        if self.memory is None:
            if valid is not None:
                values = values.masked_fill(~valid[..., None, None], self.fill)
            self.x[b, r] = values
            return
        entry, row = self.rows.places(b, r)
        at = entry * self.rows.rows + row
        if valid is not None:
            at = at.masked_fill(~valid, self.memory.shape[0] - 1)
        self.memory[at.expand(values.shape[:2])] = values

    def finish(self) -> None:
        if self.memory is not None:
            self.x.copy_(self.memory[:-1].view(self.x.shape))


@dataclass(frozen=True)
class Sequences:
    q: Rows
    k: Rows
    used: Lengths  # keys in use before the new ones join, from the first row of the cache
    new: Lengths  # new keys of each sequence
    new_start: Lengths  # where packed new keys start


def _packed(cu: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """cu_seqlens (batch + 1) -> first row and number of rows of each sequence."""
    cu = cu.long()
    start = cu[:-1].clamp(0, rows)
    return start, clamp(cu[1:], start, rows) - start


def sequences(p, t) -> Sequences:
    device = t.q.device
    q_start, q_length = (0, p.seqlen_q) if t.cu_seqlens_q is None else _packed(t.cu_seqlens_q, p.rows_q)
    if t.seqused_q is not None:
        q_length = clamp(t.seqused_q.long(), 0, q_length)

    new, new_start = p.seqlen_new, 0
    if t.cu_seqlens_new is not None:
        new_start, new = _packed(t.cu_seqlens_new, p.rows_new)
        new = at_most(new, min(p.max_new, p.seqlen_k))

    k_start, k_length = 0, p.seqlen_k
    if t.cu_seqlens_k is not None and t.block_table is None:
        k_start, k_length = _packed(t.cu_seqlens_k, p.rows_k)
    elif t.cu_seqlens_k is not None:  # pages: lengths only
        cu = t.cu_seqlens_k.long()
        k_length = clamp(cu[1:] - cu[:-1], 0, p.seqlen_k)
    used = k_length
    if t.seqused_k is not None or p.used_k >= 0:
        used = p.used_k if t.seqused_k is None else t.seqused_k.long()
        used = clamp(used, 0, k_length - new)
        k_length = used + new
    if t.leftpad_k is not None:
        pad = clamp(t.leftpad_k.long(), 0, k_length)
        k_start, k_length = k_start + pad, k_length - pad

    entry = None
    if t.cache_batch_idx is not None:
        entry = t.cache_batch_idx.long().clamp(0, p.batch_k - 1)
    elif t.cu_seqlens_k is not None:
        entry = 0
    q = Rows(p.batch_q, p.rows_q, device, q_start, q_length, None if t.cu_seqlens_q is None else 0)
    k = Rows(p.batch_k, p.rows_k, device, k_start, k_length, entry, t.block_table)
    return Sequences(q, k, used, new, new_start)
