"""Rotary embedding: pairs of columns rotated in fp32 (fp64 for fp64), and rounded once."""

from __future__ import annotations

from torch import Tensor

from flash_attn._engines.torch.sequences import Lengths, Sequences


class Rotary:
    def __init__(self, p, t, s: Sequences, dtype):
        """`dtype`: of the arithmetic."""
        self.cos, self.sin = t.rotary_cos, t.rotary_sin
        self.interleaved, self.columns, self.dtype = p.rotary_interleaved, p.rotary_dim, dtype
        # Of the first new key and the first query of each sequence. Without a mask all queries stand there.
        self.first: Lengths = s.used if t.rotary_positions is None else t.rotary_positions.long()
        self.queries_advance = p.window_left >= 0 or p.window_right >= 0 or p.chunk > 0

    def __call__(self, x: Tensor, position: Tensor) -> Tensor:
        """x (..., heads, headdim), position (...) of its rows -> a copy, rotated."""
        position = position.clamp(0, self.cos.shape[0] - 1)
        cos, sin = (table[position].to(self.dtype)[..., None, :] for table in (self.cos, self.sin))
        if self.interleaved:
            columns = slice(0, self.columns, 2), slice(1, self.columns, 2)
        else:
            columns = slice(0, self.columns // 2), slice(self.columns // 2, self.columns)
        a, b = (x[..., c].to(self.dtype) for c in columns)
        y = x.clone()
        y[..., columns[0]] = a * cos - b * sin
        y[..., columns[1]] = a * sin + b * cos
        return y
