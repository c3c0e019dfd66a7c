"""Every structured mask is one interval of keys per row: src/core/mask.hpp.

MASK 0: none. 1: windows, of which causal is one; a side without limit comes as 2^30. 2: chunks too.
"""

import triton
import triton.language as tl


@triton.jit
def floor_div(a, b):
    """Rounded down, for a of either sign and b > 0."""
    return tl.where(a >= 0, a // b, -((-a + b - 1) // b))


@triton.jit
def row_interval(p, seqlen_k, left, right, chunk, MASK: tl.constexpr):
    """Keys [lo, hi) that a row at key position p sees; p = i + seqlen_k - seqlen_q."""
    lo = p * 0
    hi = p * 0 + seqlen_k
    if MASK > 0:
        lo = tl.maximum(lo, p - left)
        hi = tl.minimum(hi, p + right + 1)
    if MASK == 2:
        start = floor_div(p, chunk) * chunk
        lo = tl.maximum(lo, start)
        hi = tl.minimum(hi, start + chunk)
    lo = tl.minimum(lo, seqlen_k)
    return lo, tl.maximum(hi, lo)


@triton.jit
def is_near(j, position, left, right, chunk, MASK: tl.constexpr):
    """The same interval for a tile whose rows lie along the second axis, where a thread has many of them: compares
    j - position with two numbers, so that it holds no bounds of rows. True past the last key."""
    gap = j - position
    near = (gap <= right) & (gap >= -left)
    if MASK == 2:
        start = floor_div(position, chunk) * chunk
        near = near & (j >= start) & (j < start + chunk)
    return near


@triton.jit
def key_tiles(i_first, i_last, seqlen_q, seqlen_k, left, right, chunk, MASK: tl.constexpr, KEYS: tl.constexpr):
    """Tiles of KEYS keys for the rows i_first..i_last: -> start, full, stop, end, multiples of KEYS from key 0.

    Tiles [full, stop) are seen whole by every row; [start, full) and [stop, end) are the edges.
    """
    shift = seqlen_k - seqlen_q
    lo, hi_all = row_interval(i_first + shift, seqlen_k, left, right, chunk, MASK)
    lo_all, hi = row_interval(i_last + shift, seqlen_k, left, right, chunk, MASK)
    start = lo // KEYS * KEYS
    end = (tl.maximum(hi, lo) + KEYS - 1) // KEYS * KEYS
    full = tl.minimum((lo_all + KEYS - 1) // KEYS * KEYS, end)
    stop = tl.maximum(hi_all // KEYS * KEYS, full)
    end = tl.maximum(end, stop)
    return start, full, stop, end


@triton.jit
def row_tiles(n_first, n_last, seqlen_q, seqlen_k, left, right, chunk, MASK: tl.constexpr, ROWS: tl.constexpr):
    """The same for the rows that see the keys n_first..n_last: hi(i) > n_first and lo(i) <= n_last, both monotone."""
    shift = seqlen_k - seqlen_q
    first = 0 * n_first
    last = 0 * n_first + seqlen_q
    first_all = first
    last_all = last
    if MASK > 0:
        first = tl.maximum(first, n_first - right - shift)
        last = tl.minimum(last, n_last + 1 + left - shift)
        first_all = tl.maximum(first_all, n_last - right - shift)
        last_all = tl.minimum(last_all, n_first + 1 + left - shift)
    if MASK == 2:
        chunk_first = n_first // chunk * chunk
        chunk_last = n_last // chunk * chunk
        first = tl.maximum(first, chunk_first - shift)
        last = tl.minimum(last, chunk_last + chunk - shift)
        first_all = tl.maximum(first_all, chunk_last - shift)
        last_all = tl.minimum(last_all, chunk_first + chunk - shift)
    first = tl.minimum(first, seqlen_q)
    last = tl.maximum(last, first)
    start = first // ROWS * ROWS
    end = (last + ROWS - 1) // ROWS * ROWS
    full = tl.minimum((tl.maximum(first_all, 0) + ROWS - 1) // ROWS * ROWS, end)
    full = tl.maximum(full, start)
    stop = tl.maximum(tl.maximum(last_all, 0) // ROWS * ROWS, full)
    stop = tl.minimum(stop, tl.maximum(end, full))
    return start, full, stop, tl.maximum(end, stop)


@triton.jit
def tile_at(index, start, full, stop, TILE: tl.constexpr, EDGE: tl.constexpr):
    """The index-th tile. EDGE 0: of the interior [full, stop); 1: of the edges before and behind it; 2: of all."""
    if EDGE == 0:
        return full + index * TILE
    elif EDGE == 1:
        left = (full - start) // TILE
        return tl.where(index < left, start + index * TILE, stop + (index - left) * TILE)
    else:
        return start + index * TILE


@triton.jit
def tile_count(start, full, stop, end, TILE: tl.constexpr, EDGE: tl.constexpr):
    if EDGE == 0:
        return (stop - full) // TILE
    elif EDGE == 1:
        return (full - start + end - stop) // TILE
    else:
        return (end - start) // TILE
