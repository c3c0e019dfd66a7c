"""What forward and backward share: the operands in blocks, and the score pipeline.

Blocks have heads before rows: queries (C, H, R, D) of sequences `b` and rows `i`, keys (C, Hk, N, D), the `j` of them,
scores (C, H, R, N). Sums are in fp32, fp64 for fp64. Products of fp32 are exact unless torch's own switches ask for
TF32 (torch.backends.cuda.matmul, torch.set_float32_matmul_precision): nothing here touches these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from flash_attn._engines.torch.blocks import block_sizes, listed_sizes
from flash_attn._engines.torch.dropout import Dropout
from flash_attn._engines.torch.mask import Mask, visible
from flash_attn._engines.torch.mods import BlockLists, Modifier
from flash_attn._engines.torch.product import masked_product
from flash_attn._engines.torch.rotary import Rotary
from flash_attn._engines.torch.sequences import Rows, as_rows, column, positions, sequences


def finite_or_zero(m: Tensor) -> Tensor:
    """A maximum to subtract: rows that have seen nothing have -inf, and -inf - -inf would be NaN."""
    return m.masked_fill(m == -torch.inf, 0.0)


@dataclass(frozen=True)
class Tile:
    """A block of keys for a block of rows."""

    j: slice
    full: bool  # every row sees every key, for all that the structure of the mask says
    kinds: Tensor | None = None  # of the listed blocks it lies in, (C or 1, H or 1); None: nothing is listed

    @property
    def asks_mask_mod(self) -> bool:
        return self.kinds is None or bool((self.kinds == BlockLists.PARTIAL).any())


class Attention:
    def __init__(self, p, t):
        self.p, self.t, self.device = p, t, t.q.device
        self.dtype = torch.float64 if t.q.dtype == torch.float64 else torch.float32  # of all sums
        self.sequences = sequences(p, t)
        self.q_rows, self.k_rows = self.sequences.q, self.sequences.k
        # A tensor without elements may come with any bound on a device; there is nothing to index.
        self.max_seqlen_q = p.max_seqlen_q if p.batch_q * p.rows_q else 0
        self.max_seqlen_k = p.max_seqlen_k if p.batch_k * p.rows_k else 0
        self.mask = Mask(p, self.sequences, self.max_seqlen_k)
        self.mods = t.mods
        self.modifier = None if t.mods is None else Modifier(t.mods, p, self.sequences, self.device)
        self.lists = None if t.mods is None else t.mods.blocks
        self.blocks = block_sizes(p) if self.lists is None else listed_sizes(block_sizes(p), self.lists)
        self.dropout = Dropout(p, t) if p.dropout_p > 0 else None
        self.rotary = Rotary(p, t, self.sequences, self.dtype) if p.rotary_dim > 0 else None

    # Blocks of operands.

    def read(self, x: Tensor, rows: Rows, b: slice, r: slice) -> Tensor:
        """(C, heads, n, cols) of an operand (entry, row, head, col), side by side: no bit depends on strides."""
        return rows.read(x, b, r).to(self.dtype).transpose(1, 2).contiguous()

    def queries(self, b: slice, i: slice) -> Tensor:
        q = self.q_rows.read(as_rows(self.t.q), b, i)
        if self.rotary is not None:
            position = column(self.rotary.first, b) + positions(i, self.device)[None] * self.rotary.queries_advance
            q = self.rotary(q, position)
        return q.to(self.dtype).transpose(1, 2).contiguous()

    def keys(self, x: Tensor, b: slice, j: slice) -> Tensor:
        """Of k or v. Keys that a sequence lacks are 0, so that nothing of them reaches a product."""
        k = self.read(as_rows(x), self.k_rows, b, j)
        valid = self.k_rows.valid(b, j)
        return k if valid is None else k.masked_fill(~valid[:, None, :, None], 0.0)

    def grouped(self, x: Tensor) -> Tensor:
        """(C, H, R, cols) -> (C, Hk, G * R, cols): all rows that read one head of keys."""
        return x.reshape(x.shape[0], self.p.nheads_k, -1, x.shape[-1])

    def ungrouped(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], self.p.nheads, -1, x.shape[-1])

    # Products in which hidden entries take no part.

    def hiding(self, seen: Tensor | None) -> Tensor | None:
        """`seen` as a mask of grouped rows, (C or 1, 1 or Hk, G * R, N); None where a plain product is enough.

        It is if a row sees all keys of its sequence: keys that a sequence lacks are 0 already.
        """
        if seen is None or not (self.mask.structured or self.mods is not None):
            return None
        return seen.repeat(1, 1, self.p.group, 1) if seen.shape[1] == 1 else self.grouped(seen)

    def times_keys(self, x: Tensor, k: Tensor, seen: Tensor | None) -> Tensor:
        """x (C, H, R, N) times k (C, Hk, N, cols) -> (C, H, R, cols)."""
        return self.ungrouped(masked_product(self.grouped(x), k, self.hiding(seen)))

    def times_rows(self, x: Tensor, q: Tensor, seen: Tensor | None) -> Tensor:
        """x (C, H, R, N) transposed, times q (C, H, R, cols), summed over the group -> (C, Hk, N, cols)."""
        hiding = self.hiding(seen)
        return masked_product(self.grouped(x).mT, self.grouped(q), None if hiding is None else hiding.mT)

    # Who sees whom.

    def tiles(self, b: slice, i: slice) -> Iterator[Tile]:
        """The blocks of keys that rows `i` may see. What no list names is left out."""
        for j, full in self.mask.tiles(i, self.blocks.keys):
            if self.lists is None:
                yield Tile(j, full)
                continue
            kinds, (rows, keys) = self.lists.kinds, self.lists.size
            row, key = i.start // rows, j.start // keys
            if row >= kinds.shape[2] or key >= kinds.shape[3]:
                continue  # behind every sequence: on a device, their lengths are not known here
            kinds = kinds[b if kinds.shape[0] > 1 else slice(None), :, row, key]
            if (kinds != BlockLists.SKIPPED).any():
                yield Tile(j, full, kinds)

    def seen(self, b: slice, i: slice, tile: Tile, intervals) -> Tensor | None:
        """(C or 1, 1 or H, R, N): whether a row sees a key of the tile; None: all of them."""
        seen = None if tile.full else visible(intervals, tile.j)
        allowed = None
        if self.mods is not None and self.mods.mask_mod is not None and tile.asks_mask_mod:
            allowed = self.modifier.allowed(b, i, tile.j)
        if tile.kinds is not None and len(tile.kinds.unique()) > 1:
            kinds = tile.kinds.to(self.device)[..., None, None]
            kinds = kinds.expand(-1, -1, i.stop - i.start, tile.j.stop - tile.j.start)
            listed = kinds != BlockLists.SKIPPED
            allowed = listed if allowed is None else (kinds == BlockLists.FULL) | (listed & allowed)
        if allowed is None or seen is None:
            return allowed if seen is None else seen
        return seen & allowed

    # Scores.

    def of_bias(self, x: Tensor, b: slice, i: slice, j: slice) -> Tensor:
        """A view of the bias, or of its gradient; broadcast dimensions stay 1."""
        every = slice(None)
        return x[b if x.shape[0] > 1 else every, :, i if x.shape[2] > 1 else every, j]

    def bias(self, b: slice, i: slice, j: slice) -> Tensor:
        x = self.of_bias(self.t.bias, b, i, j)
        if x.dtype == torch.float64 != self.dtype:  # what is finite must not become -inf, and hide a key
            largest = torch.finfo(self.dtype).max
            x = torch.where(torch.isinf(x), x, x.clamp(-largest, largest))
        return x.to(self.dtype)

    def scores(
        self, q: Tensor, k: Tensor, b: slice, i: slice, j: slice, seen: Tensor | None, gradient: bool = False
    ) -> tuple[Tensor, Callable | None]:
        """-> s (C, H, R, N), -inf where hidden; and ds -> du, u = scale * q.k (None: they are equal)."""
        p, t = self.p, self.t
        s = self.ungrouped(self.grouped(q) @ k.mT) * p.scale
        pull = None
        if p.softcap > 0:
            s = torch.tanh(s / p.softcap)
            if gradient:
                slope = 1 - s * s
                pull = slope.mul
            s = s * p.softcap
        if self.mods is not None and self.mods.score_mod is not None:
            s, pull = self.modifier.score(s, b, i, j, gradient)
        if t.alibi_slopes is not None:
            distance = (self.mask.position(b, i)[..., None] - positions(j, self.device)).abs().to(self.dtype)
            alibi = t.alibi_slopes if t.alibi_slopes.dim() == 1 else t.alibi_slopes[b]
            s = s - alibi.to(self.dtype)[..., None, None] * distance[:, None]
        if t.bias is not None:
            s = s + self.bias(b, i, j)
        if seen is not None:
            s = s.masked_fill(~seen, -torch.inf)
        return s, pull

    def factors(self, b: slice, i: slice, j: slice) -> Tensor:
        return self.dropout.factors(b, i, j, self.dtype)

    def sink(self) -> Tensor | None:
        """(H, 1, 1)"""
        return None if self.t.sink is None else self.t.sink.to(self.dtype)[:, None, None]

    def softmax(self, b: slice, i: slice, q: Tensor, intervals, values: bool):
        """Online: m, the largest score (C, H, R, 1); l, the sum of exp(s - m) of keys and sink; out * l, if `values`.

        m is NaN where a score is, and -inf where a row sees nothing; l is 0 there.
        """
        shape = (*q.shape[:3], 1)
        sink = self.sink()
        m = q.new_full(shape, -torch.inf) if sink is None else sink.expand(shape)
        total = torch.exp(m - finite_or_zero(m))
        out = q.new_zeros((*q.shape[:3], self.p.headdim_v)) if values else None
        for tile in self.tiles(b, i):
            j, seen = tile.j, self.seen(b, i, tile, intervals)
            s, _ = self.scores(q, self.keys(self.t.k, b, j), b, i, j, seen)
            largest = torch.maximum(m, s.amax(-1, keepdim=True))
            base = finite_or_zero(largest)
            e = torch.exp(s - base)
            rescale = torch.exp(m - base)
            total = total * rescale + e.sum(-1, keepdim=True)
            if values:
                e = e if self.dropout is None else e * self.factors(b, i, j)
                out = out * rescale + self.times_keys(e, self.keys(self.t.v, b, j), seen)
            m = largest
        return m, total, out
