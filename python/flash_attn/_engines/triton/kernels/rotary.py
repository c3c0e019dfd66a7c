"""Rotary embedding of a tile of rows, in fp32, rounded once: src/core/append.cpp."""

import triton
import triton.language as tl

from .sequences import clamp


@triton.jit
def first_position(b, positions, used_k, used):
    """Where the first query and the first new key of a sequence stand."""
    if positions is not None:
        return tl.load(positions + b)
    elif used_k is not None:
        return tl.load(used_k + b)
    else:
        return b * 0 + used


@triton.jit
def rotate(
    where, rows_known, cols, size, stride_col, at, cos, sin, cos_r, cos_c, sin_r, sin_c, rows_cos, pairs,
    INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Rows at the addresses `where` (ROWS, 1) of their first column -> (ROWS, COLS), rotated to positions at (ROWS).

    Column a of a pair becomes x_a cos - x_b sin, column b becomes x_a sin + x_b cos.
    """
    if INTERLEAVED:
        pair = cols // 2
        second = cols % 2 == 1
        partner = tl.where(second, cols - 1, cols + 1)
    else:
        second = cols >= pairs
        pair = tl.where(second, cols - pairs, cols)
        partner = tl.where(second, cols - pairs, cols + pairs)
    turns = cols < 2 * pairs
    known = rows_known[:, None] & (cols < size)[None, :]
    if stride_col is None:
        x = tl.load(where + cols[None, :], mask=known, other=0.0)
        y = tl.load(where + partner[None, :], mask=known & turns[None, :], other=0.0)
    else:
        x = tl.load(where + cols.to(tl.int64)[None, :] * stride_col, mask=known, other=0.0)
        y = tl.load(where + partner.to(tl.int64)[None, :] * stride_col, mask=known & turns[None, :], other=0.0)
    row = clamp(at, 0, rows_cos - 1).to(tl.int64)[:, None]
    angle = known & turns[None, :]
    c = tl.load(cos + row * cos_r + pair[None, :] * cos_c, mask=angle, other=1.0).to(tl.float32)
    s = tl.load(sin + row * sin_r + pair[None, :] * sin_c, mask=angle, other=0.0).to(tl.float32)
    turned = x.to(tl.float32) * c + tl.where(second[None, :], y.to(tl.float32) * s, -(y.to(tl.float32) * s))
    return tl.where(turns[None, :], turned.to(x.dtype), x)
