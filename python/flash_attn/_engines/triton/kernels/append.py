"""New keys and values join the cache, behind the keys in use; keys are rotated to where they stand:
src/core/append.cpp.

A program moves ROWS new rows of one head: each is read once and written once.
"""

import triton
import triton.language as tl

from .rotary import first_position, rotate
from .sequences import clamp, new_rows


@triton.jit
def move(
    x, new, first_new, first, i, known, batch, table, page_size, batch_k, head, size,
    x_b, x_r, x_h, x_c, n_b, n_r, n_h, n_c, at, cos, sin, cos_r, cos_c, sin_r, sin_c, rows_cos, pairs,
    COLS: tl.constexpr, PAGED: tl.constexpr, INTERLEAVED: tl.constexpr, ROTATE: tl.constexpr,
):  # fmt: skip
    """Rows first_new + i of `new` go to logical rows first + i of x."""
    cols = tl.arange(0, COLS)
    mask = known[:, None] & (cols < size)[None, :]
    source = new + n_b + head.to(tl.int64) * n_h + ((first_new + i).to(tl.int64) * n_r)[:, None]
    if ROTATE:
        rows = rotate(
            source, known, cols, size, n_c, at, cos, sin, cos_r, cos_c, sin_r, sin_c, rows_cos, pairs, INTERLEAVED
        )
    elif n_c is None:
        rows = tl.load(source + cols[None, :], mask=mask, other=0.0)
    else:
        rows = tl.load(source + cols.to(tl.int64)[None, :] * n_c, mask=mask, other=0.0)
    t = first + i
    if PAGED:
        page = clamp(tl.load(table + t // page_size, mask=known, other=0), 0, batch_k - 1)
        along = page.to(tl.int64) * x_b + (t % page_size).to(tl.int64) * x_r
    else:
        along = batch.to(tl.int64) * x_b + t.to(tl.int64) * x_r
    target = x + head.to(tl.int64) * x_h + along[:, None]
    if x_c is None:
        tl.store(target + cols[None, :], rows, mask=mask)
    else:
        tl.store(target + cols.to(tl.int64)[None, :] * x_c, rows, mask=mask)


@triton.jit
def append_kernel(
    k, v, new_k, new_v, used_k, entry, pages, cu_new, cos, sin, positions,
    k_b: "i64", k_r: "i64", k_h: "i64", v_b: "i64", v_r: "i64", v_h: "i64",
    nk_b: "i64", nk_r: "i64", nk_h: "i64", nv_b: "i64", nv_r: "i64", nv_h: "i64", k_c, v_c, nk_c, nv_c,
    nheads_k, tiles, headdim, headdim_v, batch_k, seqlen_k, used, seqlen_new, rows_new, max_new, page_size, pages_b,
    cos_r, cos_c, sin_r, sin_c, rows_cos, pairs,
    ROWS: tl.constexpr, COLS: tl.constexpr, COLS_V: tl.constexpr, PAGED: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    head = pid % nheads_k
    tile = pid // nheads_k % tiles
    b = pid // nheads_k // tiles
    first_new, new = new_rows(b, cu_new, seqlen_new, rows_new, max_new, seqlen_k)
    if used_k is not None:
        first = tl.load(used_k + b)
    else:
        first = b * 0 + used
    first = clamp(first, 0, seqlen_k - new)
    i = tile * ROWS + tl.arange(0, ROWS)
    known = i < new
    batch = b
    if entry is not None:
        batch = clamp(tl.load(entry + b), 0, batch_k - 1)
    table = pages
    if PAGED:
        table = pages + b.to(tl.int64) * pages_b
    n_b = b.to(tl.int64)
    if cu_new is not None:
        n_b = n_b * 0
    at = i
    if cos is not None:
        at = first_position(b, positions, used_k, used) + i
    move(
        k, new_k, first_new, first, i, known, batch, table, page_size, batch_k, head, headdim,
        k_b, k_r, k_h, k_c, n_b * nk_b, nk_r, nk_h, nk_c, at, cos, sin, cos_r, cos_c, sin_r, sin_c, rows_cos, pairs,
        COLS, PAGED, INTERLEAVED, cos is not None,
    )  # fmt: skip
    move(
        v, new_v, first_new, first, i, known, batch, table, page_size, batch_k, head, headdim_v,
        v_b, v_r, v_h, v_c, n_b * nv_b, nv_r, nv_h, nv_c, at, None, None, cos_r, cos_c, sin_r, sin_c, rows_cos, pairs,
        COLS_V, PAGED, INTERLEAVED, False,
    )  # fmt: skip
