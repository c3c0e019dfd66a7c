"""Gradients, from the same blocks. With P, Z as in the forward, g = dout_i, e = dlse_i (0 if absent):

  dv_j += Z_j P_j g     dP_j = Z_j (g . v_j)     ds_j = P_j (dP_j - delta + e), delta = g . out
  dbias_j = ds_j        du_j = ds_j (ds/du)_j    dq = scale sum_j du_j k_j, dk_j += scale du_j q
  dsink = P_sink (e - delta)

P is computed afresh from q and k, as exp(s - m) / l, with m and l from a pass of their own. The lse that the forward
wrote is one number in fp32, which loses l beside a large m: a row of biases of -1e9 has no digits left of log(l), and
fp64 gradients would have those of fp32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flash_attn._engines.torch.attention import Attention, Tile, finite_or_zero
from flash_attn._engines.torch.blocks import slices
from flash_attn._engines.torch.sequences import Writer, as_rows, lse_as_rows


@dataclass
class RowBlock:
    """Rows `i` of sequences `b`. Tensors are (C, H, R, 1) unless said otherwise."""

    i: slice
    intervals: tuple[Tensor, Tensor]  # (C or 1, R)
    base: Tensor  # m
    total: Tensor  # l; 1 where it is 0
    sees: Tensor  # whether the row sees a key: those that do not leave no gradient, whatever they hold
    shift: Tensor  # delta - dlse
    dq: Tensor  # (C, H, R, headdim)


class Gradients:
    def __init__(self, p, t):
        self.a, self.t = Attention(p, t), t
        self.dq = Writer(as_rows(t.dq), self.a.q_rows)
        self.dk = Writer(as_rows(t.dk), self.a.k_rows)
        self.dv = Writer(as_rows(t.dv), self.a.k_rows)
        self.dbias = None
        if t.dbias is not None:
            self.dbias = t.dbias.zero_() if self.a.dtype == t.dbias.dtype else t.dbias.new_zeros(
                t.dbias.shape, dtype=self.a.dtype)  # fmt: skip
        self.dsink = None if t.dsink is None else t.dsink.new_zeros(t.dsink.shape, dtype=self.a.dtype)

    def finish(self) -> None:
        for writer in (self.dq, self.dk, self.dv):
            writer.finish()
        if self.dbias is not None and self.dbias is not self.t.dbias:
            self.t.dbias.copy_(self.dbias)
        if self.dsink is not None:
            self.t.dsink.copy_(self.dsink)

    def row_block(self, b: slice, i: slice) -> RowBlock:
        a, t = self.a, self.t
        q, intervals = a.queries(b, i), a.mask.intervals(b, i)
        m, total, _ = a.softmax(b, i, q, intervals, values=False)
        lo, hi = (x[:, None, :, None] for x in intervals)
        something = m != -torch.inf  # a key or the sink
        sees = (hi > lo) & something
        total = total.masked_fill(~something, 1.0)
        dout, out = (a.read(as_rows(x), a.q_rows, b, i) for x in (t.dout, t.out))
        shift = (dout * out).sum(-1, keepdim=True).masked_fill(~sees, 0.0)
        if t.dlse is not None:
            shift = shift - a.read(lse_as_rows(t.dlse), a.q_rows, b, i)
        if self.dsink is not None:
            valid = a.q_rows.valid(b, i)
            counts = something if valid is None else something & valid[:, None, :, None]
            p_sink = torch.exp(a.sink() - finite_or_zero(m)) / total
            self.dsink -= (p_sink * shift).masked_fill(~counts, 0.0).sum((0, 2, 3))
        return RowBlock(i, intervals, finite_or_zero(m), total, sees, shift, torch.zeros_like(q))

    def tile(self, b: slice, r: RowBlock, tile: Tile, k: Tensor, v: Tensor, dk: Tensor, dv: Tensor) -> None:
        """What rows `r` and the keys of the tile give to dk, dv, r.dq, dbias and what score_mod captures."""
        a, i, j = self.a, r.i, tile.j
        q = a.queries(b, i)
        dout = a.read(as_rows(self.t.dout), a.q_rows, b, i).masked_fill(~r.sees, 0.0)
        seen = a.seen(b, i, tile, r.intervals)
        s, pull = a.scores(q, k, b, i, j, seen, gradient=True)
        p = torch.exp(s - r.base) / r.total
        if seen is not None:
            p = p.masked_fill(~seen, 0.0)  # NaN so far, in a row that sees one
        dp = a.ungrouped(a.grouped(dout) @ v.mT)
        kept = p
        if a.dropout is not None:
            z = a.factors(b, i, j)
            kept, dp = p * z, dp * z
        dv += a.times_rows(kept, dout, seen)
        ds = (p * (dp - r.shift)).masked_fill(~r.sees, 0.0)
        if seen is not None:
            ds = ds.masked_fill(~seen, 0.0)
        if self.dbias is not None:
            dbias = a.of_bias(self.dbias, b, i, j)
            dbias += ds.sum_to_size(dbias.shape)
        if pull is not None:  # a slope may be NaN where a row sees nothing, or a key is hidden
            ds = pull(ds).masked_fill(~r.sees if seen is None else ~(r.sees & seen), 0.0)
        du = ds * a.p.scale
        r.dq += a.times_keys(du, k, seen)
        dk += a.times_rows(du, q.masked_fill(~r.sees, 0.0), seen)

    def sequences(self, b: slice) -> None:
        a, t = self.a, self.t
        rows = [self.row_block(b, i) for i in slices(a.max_seqlen_q, a.blocks.rows)]
        tiles = [{tile.j.start: tile for tile in a.tiles(b, r.i)} for r in rows]
        for j in slices(a.max_seqlen_k, a.blocks.keys):
            k, v = a.keys(t.k, b, j), a.keys(t.v, b, j)
            dk, dv = torch.zeros_like(k), torch.zeros_like(v)
            for r, of_rows in zip(rows, tiles, strict=True):
                if j.start in of_rows:
                    self.tile(b, r, of_rows[j.start], k, v, dk, dv)
            self.dk.put(b, j, dk)
            self.dv.put(b, j, dv)
        for r in rows:
            self.dq.put(b, r.i, r.dq.masked_fill(~r.sees, 0.0))


def backward(p, t) -> None:
    g = Gradients(p, t)
    for b in slices(p.batch if g.a.max_seqlen_q else 0, g.a.blocks.batch):
        g.sequences(b)
    g.finish()
