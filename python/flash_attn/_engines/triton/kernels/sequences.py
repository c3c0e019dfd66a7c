"""Where a sequence's queries and keys lie: src/core's SequenceTable::at, with every index of a table clamped.

Tables on a device are read here only. Whatever they hold, no row or page leads outside its tensor.
"""

import triton
import triton.language as tl


@triton.jit
def clamp(x, low, high):
    return tl.maximum(tl.minimum(x, high), low)


@triton.jit
def query_rows(b, cu_q, used_q, rows_q):
    """-> batch entry of q, first row, rows that belong to sequence b, rows in use."""
    if cu_q is None:
        batch = b
        first = b * 0
        rows = b * 0 + rows_q
    else:
        batch = b * 0
        first = clamp(tl.load(cu_q + b), 0, rows_q)
        rows = clamp(tl.load(cu_q + b + 1), first, rows_q) - first
    used = rows
    if used_q is not None:
        used = clamp(tl.load(used_q + b), 0, rows)
    return batch, first, rows, used


@triton.jit
def new_rows(b, cu_new, seqlen_new, rows_new, max_new, capacity):
    """-> first row of sequence b in the memory of the new keys, and how many there are: never more than fit."""
    if cu_new is None:
        first = b * 0
        count = b * 0
        if seqlen_new is not None:
            count = b * 0 + tl.minimum(seqlen_new, capacity)
    else:
        start = tl.load(cu_new + b)
        count = clamp(tl.load(cu_new + b + 1) - start, 0, tl.minimum(max_new, capacity))
        first = clamp(start, 0, rows_new - count)
    return first, count


@triton.jit
def key_rows(
    b, cu_k, used_k, leftpad, entry, cu_new, rows_k, batch_k, capacity, used, seqlen_new, rows_new, max_new,
    PAGED: tl.constexpr,
):  # fmt: skip
    """-> batch entry of k, first row (with pages: first logical row), keys, new ones included."""
    batch = b
    first = b * 0
    count = b * 0 + capacity
    if cu_k is not None:
        if PAGED:
            count = clamp(tl.load(cu_k + b + 1) - tl.load(cu_k + b), 0, capacity)
        else:
            batch = b * 0
            first = clamp(tl.load(cu_k + b), 0, rows_k)
            count = clamp(tl.load(cu_k + b + 1), first, rows_k) - first
    _, new = new_rows(b, cu_new, seqlen_new, rows_new, max_new, count)
    if used_k is not None:
        count = clamp(tl.load(used_k + b), 0, count - new) + new
    elif used is not None:
        count = clamp(used, 0, count - new) + new
    if leftpad is not None:
        pad = clamp(tl.load(leftpad + b), 0, count)
        first += pad
        count -= pad
    if entry is not None:
        batch = clamp(tl.load(entry + b), 0, batch_k - 1)
    return batch, first, count


@triton.jit
def tile_offsets(rows, cols, stride_row, stride_col, UNIT: tl.constexpr, WIDE: tl.constexpr):
    """Offsets of rows x cols within a tile. 32 bits, but for strides that the host has found too long for them."""
    if WIDE:
        along = rows.to(tl.int64)[:, None] * stride_row * UNIT
    else:
        along = rows[:, None] * stride_row.to(tl.int32) * UNIT
    if stride_col is None:
        across = cols[None, :]
    elif WIDE:
        across = cols.to(tl.int64)[None, :] * stride_col
    else:
        across = cols[None, :] * stride_col
    return along + across


@triton.jit
def pages_at(table, n, first, count, page_size, KEYS: tl.constexpr, PAGED: tl.constexpr):
    """What the table says of keys n + [0, KEYS), to be clamped; 0 past the last key.

    PAGED 1: pages of any size, looked up key by key. 2: so too, but a tile holds whole pages, and no division is in
    the loop. 3: a page holds whole tiles, and is looked up once.
    """
    if PAGED == 3:
        return tl.load(table + (first + n) // page_size, mask=n < count, other=0)
    elif PAGED == 2:
        keys = tl.arange(0, KEYS)
        return tl.load(table + n // page_size + keys // page_size, mask=n + keys < count, other=0)
    elif PAGED == 1:
        keys = n + tl.arange(0, KEYS)
        return tl.load(table + (first + keys) // page_size, mask=keys < count, other=0)
    else:
        return n  # a number, for nobody


@triton.jit
def load_tile(
    base, n, first, count, pages, page_size, batch_k, stride_batch, stride_row, stride_col, size,
    KEYS: tl.constexpr, COLS: tl.constexpr, EVEN: tl.constexpr, EDGE: tl.constexpr, PAGED: tl.constexpr,
    UNIT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Keys (or values) n + [0, KEYS) of a sequence, (KEYS, COLS); zeros past its `count` keys and its `size` columns.

    pages: of pages_at. Looked up a tile ahead in loops: the way from the table to the keys is as long as that from the
    keys to the product.
    """
    keys = tl.arange(0, KEYS)
    cols = tl.arange(0, COLS)
    if PAGED == 1 or PAGED == 2:
        pages_start = base + (clamp(pages, 0, batch_k - 1).to(tl.int64) * stride_batch * UNIT)[:, None]
        if PAGED == 1:
            where = pages_start + tile_offsets((first + n + keys) % page_size, cols, stride_row, stride_col, UNIT, True)
        else:
            where = pages_start + tile_offsets(keys % page_size, cols, stride_row, stride_col, UNIT, WIDE)
    elif PAGED == 3:
        page = clamp(pages, 0, batch_k - 1).to(tl.int64)
        start = (page * stride_batch + ((first + n) % page_size).to(tl.int64) * stride_row) * UNIT
        where = base + start + tile_offsets(keys, cols, stride_row, stride_col, UNIT, WIDE)
    else:
        start = (first + n).to(tl.int64) * stride_row * UNIT
        where = base + start + tile_offsets(keys, cols, stride_row, stride_col, UNIT, WIDE)
    if EDGE and EVEN:
        return tl.load(where, mask=(n + keys < count)[:, None], other=0.0)
    elif EDGE:
        return tl.load(where, mask=(n + keys < count)[:, None] & (cols < size)[None, :], other=0.0)
    elif EVEN:
        return tl.load(where)
    else:
        return tl.load(where, mask=(cols < size)[None, :], other=0.0)


@triton.jit
def is_outside(cu, sequences, row, rows):
    """Rows of packed memory that belong to no sequence. The one use of cu_seqlens beyond a program's own sequence."""
    return (row < rows) & ((row < tl.load(cu)) | (row >= tl.load(cu + sequences)))


@triton.jit
def clear_rows(
    x, row, outside, nheads, stride_row, stride_head, stride_col, size, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """Zeros in rows `row` (ROWS) of all heads. Strides in elements."""
    cols = tl.arange(0, COLS)
    where = x + (row.to(tl.int64) * stride_row)[:, None]
    if stride_col is None:
        where += cols[None, :]
    else:
        where += cols.to(tl.int64)[None, :] * stride_col
    known = outside[:, None] & (cols < size)[None, :]
    for h in range(nheads):
        tl.store(where + stride_head * h, tl.zeros((ROWS, COLS), x.dtype.element_ty), mask=known)


@triton.jit
def tile_and_head(pid, tiles, block, heads, LAST_FIRST: tl.constexpr):
    """The order of programs: blocks of `block` heads, whose tensors stay in the cache together; of these first the
    tiles with most work under a causal mask (the last rows, the first keys), then the next tiles of all of them."""
    which = pid // (tiles * block)
    width = tl.minimum(block, heads - which * block)
    rest = pid % (tiles * block)
    tile = rest // width
    if LAST_FIRST:
        tile = tiles - 1 - tile
    return tile, which * block + rest % width


@triton.jit
def first_slot(cu, b, known, rows, group, TILE: tl.constexpr):
    """Sequence b's first slot for a tile. It has one slot more than whole tiles fit in its rows: enough wherever it
    begins, since floor(y / TILE) - floor(x / TILE) + 1 >= (y - x) / TILE."""
    row = clamp(tl.load(cu + b, mask=known, other=0), 0, rows)
    return (row.to(tl.int64) * group // TILE).to(tl.int32) + b


@triton.jit
def sequence_of(slot, cu, sequences, rows, group, TILE: tl.constexpr):
    """-> the last sequence whose first slot is at or before `slot`, and which of its tiles (none, if < 0 or past
    its last row). By halves, then 128 at once: up to 128 sequences this is one load."""
    low = slot * 0
    high = low + sequences
    while high - low > 128:
        middle = (low + high) // 2
        is_before = first_slot(cu, middle, True, rows, group, TILE) <= slot
        low = tl.where(is_before, middle, low)
        high = tl.where(is_before, high, middle)
    b = low + tl.arange(0, 128)
    is_before = (b < high) & (first_slot(cu, b, b < high, rows, group, TILE) <= slot)
    found = low + tl.maximum(tl.sum(is_before.to(tl.int32), 0) - 1, 0)
    return found, slot - first_slot(cu, found, True, rows, group, TILE)


@triton.jit
def place_of(pid, tiles, block, heads, heads_of, slots, cu, rows, group, TILE: tl.constexpr, LAST_FIRST: tl.constexpr):
    """-> tile, sequence, and head of the sequence's `heads_of`. `heads` of all sequences have `tiles` each; but with
    slots > 0, which packed rows of unequal sequences have, tiles are where sequences leave room for them: the longest
    one makes no empty programs for the others."""
    if slots is None:
        tile, head = tile_and_head(pid, tiles, block, heads, LAST_FIRST)
        return tile, head // heads_of, head % heads_of
    else:
        if slots > 0:
            slot, h = tile_and_head(pid, slots, block, heads_of, LAST_FIRST)
            b, tile = sequence_of(slot, cu, heads // heads_of, rows, group, TILE)
        else:
            tile, head = tile_and_head(pid, tiles, block, heads, LAST_FIRST)
            b = head // heads_of
            h = head % heads_of
        return tile, b, h
