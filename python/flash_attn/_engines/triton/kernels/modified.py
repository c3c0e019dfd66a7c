"""Attention with a caller's functions of scores: SCORE, its gradient PULL, MASK, and lists of the tiles that count.

The functions are made by traced.py, and are called with blocks that broadcast:

    SCORE(s, b, h, i, j, lengths, tables, sizes) -> s'     PULL(ds', s, b, h, ...) -> ds     MASK(b, h, ...) -> bool

s is the natural score, scale q.k; b and h numbers, i and j positions within the sequence, no further than its last one.
Every tile is masked, whole ones too: which keys a row sees is known to MASK alone. With lists (counts, tiles, LISTED) a
program visits the tiles of its list; `whole` of them ask no MASK.
"""

import triton
import triton.language as tl

from .backward import load_rows, store_tile
from .forward import any_nan, never
from .gradients import from_base, row_statistics, with_sums
from .mask import key_tiles, row_interval, row_tiles
from .scores import LOG2E
from .sequences import clear_rows, is_outside, key_rows, load_tile, pages_at, place_of, query_rows


@triton.jit
def position(x, length):
    return tl.maximum(tl.minimum(x, length - 1), 0)


@triton.jit
def modified(s, b, h, i, j, lengths, tables, sizes, SCORE: tl.constexpr):
    if SCORE is None:
        return s
    else:
        return SCORE(s, b, h, i, j, lengths, tables, sizes) + tl.zeros_like(s)


@triton.jit
def is_visible(b, h, i, j, ii, jj, lo, hi, is_whole, lengths, tables, sizes, MASK: tl.constexpr):
    """The structured mask, an interval [lo, hi) of keys for each row, and the caller's."""
    near = (j >= lo) & (j < hi)
    if MASK is None:
        return near
    else:
        return near & (MASK(b, h, ii, jj, lengths, tables, sizes) | is_whole)


@triton.jit
def next_tile(index, start, list_at, counts_at, TILE: tl.constexpr, LISTED: tl.constexpr):
    """-> the first row or key of the index-th tile, and whether it is listed as whole. An entry is twice the tile's
    number, and one more if it is whole."""
    if LISTED:
        entry = tl.load(list_at + index)
        return entry // 2 * TILE, entry % 2 == 1
    else:
        return start + index * TILE, index < 0


@triton.jit
def modified_forward_kernel(
    q, k, v, out, lse, cu_q, cu_k, used_q, used_k, pages, sink, counts, listed, t0, t1, t2, t3,
    q_b: "i64", q_r: "i64", q_h: "i64", k_b: "i64", k_r: "i64", k_h: "i64",
    v_b: "i64", v_r: "i64", v_h: "i64", o_b: "i64", o_r: "i64", o_h: "i64", lse_b: "i64", lse_h: "i64",
    q_c, k_c, v_c, o_c, lse_r, sink_h, counts_b, counts_h, listed_r,
    heads, nheads, group, tiles, block, rows_q, rows_k, seqlen_k, headdim, headdim_v, used, batch_k, page_size, pages_b,
    left, right, programs, slots,
    n00: "i64", n01: "i64", n02: "i64", n03: "i64", n10: "i64", n11: "i64", n12: "i64", n13: "i64",
    n20: "i64", n21: "i64", n22: "i64", n23: "i64", n30: "i64", n31: "i64", n32: "i64", n33: "i64",
    scale: "fp32", empty_lse: "fp32",
    ROWS: tl.constexpr, KEYS: tl.constexpr, COLS: tl.constexpr, COLS_V: tl.constexpr, EVEN: tl.constexpr,
    UNIT: tl.constexpr, WIDE: tl.constexpr, WINDOW: tl.constexpr, PAGED: tl.constexpr, LISTED: tl.constexpr,
    PRECISION: tl.constexpr, SCORE: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    headdim *= UNIT
    headdim_v *= UNIT
    pid = tl.program_id(0)
    if cu_q is not None:  # programs behind the others: rows of no sequence
        if pid >= programs:
            row = (pid - programs) * ROWS + tl.arange(0, ROWS)
            outside = is_outside(cu_q, heads // nheads, row, rows_q)
            if tl.max(outside.to(tl.int32), 0) > 0:
                clear_rows(out, row, outside, nheads, o_r * UNIT, o_h * UNIT, o_c, headdim_v, ROWS, COLS_V)
                if lse is not None:
                    for h in range(nheads):
                        to_lse = lse + lse_h * h + row.to(tl.int64) * lse_r
                        tl.store(to_lse, tl.zeros((ROWS,), tl.float32) + empty_lse, mask=outside)
            return
    tile, b, h = place_of(pid, tiles, block, heads, nheads, slots, cu_q, rows_q, 1, ROWS, True)
    head_k = h // group
    q_batch, q_first, rows, seqlen_q = query_rows(b, cu_q, used_q, rows_q)
    m0 = tile * ROWS
    if (tile < 0) | (m0 >= rows):
        return
    k_batch, k_first, count = key_rows(
        b, cu_k, used_k, None, None, None, rows_k, batch_k, seqlen_k, used, None, None, None, PAGED > 0
    )
    i = m0 + tl.arange(0, ROWS)
    valid = i < seqlen_q
    ii = position(i, seqlen_q)[:, None]
    lengths = (seqlen_q, count, q_first, k_first)
    tables = (t0, t1, t2, t3)
    sizes = ((n00, n01, n02, n03), (n10, n11, n12, n13), (n20, n21, n22, n23), (n30, n31, n32, n33))

    q_at = q + (q_batch.to(tl.int64) * q_b + h.to(tl.int64) * q_h) * UNIT
    queries = load_rows(q_at, q_first, i, valid, q_r, q_c, headdim, COLS, EVEN, UNIT)
    k_at = k + head_k.to(tl.int64) * k_h * UNIT
    v_at = v + head_k.to(tl.int64) * v_h * UNIT
    table = pages
    if PAGED > 0:
        table = pages + b.to(tl.int64) * pages_b
    else:
        k_at += k_batch.to(tl.int64) * k_b * UNIT
        v_at += k_batch.to(tl.int64) * v_b * UNIT
    start, full, stop, end = key_tiles(
        m0, tl.minimum(m0 + ROWS, seqlen_q) - 1, seqlen_q, count, left, right, None, WINDOW, KEYS
    )
    lo, hi = row_interval(i + count - seqlen_q, count, left, right, None, WINDOW)
    many = (end - start) // KEYS
    list_at = listed
    if LISTED:
        line = (b * counts_b + h * counts_h + m0 // ROWS).to(tl.int64)
        many = tl.load(counts + line)
        list_at = listed + line * listed_r
    if m0 >= seqlen_q:
        many = 0

    m = tl.zeros((ROWS,), tl.float32) - float("inf")
    l = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, COLS_V), tl.float32)
    for index in tl.range(0, many):
        n, is_whole = next_tile(index, start, list_at, counts, KEYS, LISTED)
        here = pages_at(table, n, k_first, count, page_size, KEYS, PAGED)
        keys = load_tile(k_at, n, k_first, count, here, page_size, batch_k, k_b, k_r, k_c, headdim,
                         KEYS, COLS, EVEN, True, PAGED, UNIT, WIDE)  # fmt: skip
        s = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale
        j = (n + tl.arange(0, KEYS))[None, :]
        jj = position(j, count)
        s = modified(s, b, h, ii, jj, lengths, tables, sizes, SCORE)
        seen = is_visible(b, h, i[:, None], j, ii, jj, lo[:, None], hi[:, None], is_whole, lengths, tables, sizes, MASK)
        s = tl.where(seen, s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1))
        top = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp2((s - top[:, None]) * LOG2E)
        shrink = tl.exp2((m - top) * LOG2E)
        l = l * shrink + tl.sum(p, 1)
        values = load_tile(v_at, n, k_first, count, here, page_size, batch_k, v_b, v_r, v_c, headdim_v,
                           KEYS, COLS_V, EVEN, True, PAGED, UNIT, WIDE)  # fmt: skip
        acc = tl.dot(p.to(values.dtype), values, acc * shrink[:, None], input_precision=PRECISION)
        m = m_new

    if any_nan(acc):  # a value that is no number, beside a probability of 0: once more, key by key, as forward_kernel
        acc = tl.zeros((ROWS, COLS_V), tl.float32)
        hidden = never(nheads)
        top = tl.where(m == float("-inf"), 0.0, m)
        BY_KEY: tl.constexpr = 1 if PAGED > 0 else 0
        for index in range(many * KEYS):
            n, is_whole = next_tile(index // KEYS, start, list_at, counts, KEYS, LISTED)
            n += index % KEYS
            queries = load_rows(q_at, q_first, i + hidden, valid, q_r, q_c, headdim, COLS, EVEN, UNIT)
            here = pages_at(table, n, k_first, count, page_size, 1, BY_KEY)
            keys = load_tile(k_at, n, k_first, count, here, page_size, batch_k, k_b, k_r, k_c, headdim,
                             1, COLS, EVEN, True, BY_KEY, UNIT, WIDE)  # fmt: skip
            values = load_tile(v_at, n, k_first, count, here, page_size, batch_k, v_b, v_r, v_c, headdim_v,
                               1, COLS_V, EVEN, True, BY_KEY, UNIT, WIDE)  # fmt: skip
            s = tl.sum(queries.to(tl.float32) * keys.to(tl.float32), 1)[:, None] * scale
            j = n + tl.zeros((1, 1), tl.int32)
            jj = position(j, count)
            s = modified(s, b, h, ii, jj, lengths, tables, sizes, SCORE)
            seen = is_visible(
                b, h, i[:, None], j, ii, jj, lo[:, None], hi[:, None], is_whole, lengths, tables, sizes, MASK
            )
            p = tl.exp2((s - top[:, None]) * LOG2E)
            acc += tl.where(seen, p * values.to(tl.float32), 0.0)

    if sink is not None:
        logit = tl.load(sink + h * sink_h).to(tl.float32)
        most = tl.maximum(m, logit)
        most = tl.where(most == float("-inf"), 0.0, most)
        shrink = tl.exp2((m - most) * LOG2E)
        l = l * shrink + tl.exp2((logit - most) * LOG2E)
        acc = acc * shrink[:, None]
        m = most
    has = valid & (l != 0)
    acc = tl.where(has[:, None], acc / tl.where(has, l, 1.0)[:, None], 0.0)
    known = i < rows
    o_at = out + (q_batch.to(tl.int64) * o_b + h.to(tl.int64) * o_h) * UNIT
    store_tile(o_at, q_first + i, known, o_r, o_c, headdim_v, acc, COLS_V, UNIT)
    if lse is not None:
        to = lse + q_batch.to(tl.int64) * lse_b + h.to(tl.int64) * lse_h + (q_first + i).to(tl.int64) * lse_r
        tl.store(to, tl.where(has, m + tl.log(l), empty_lse), mask=known)


@triton.jit
def gradient_of_scores(
    s, dp, l2, base, d, seen, b, h, ii, jj, lengths, tables, sizes, SCORE: tl.constexpr, PULL: tl.constexpr
):  # fmt: skip
    """Scores q.k * scale, dout . v, and of each row what gradients.py says -> P and dU, 0 where a row sees no key."""
    t = modified(s, b, h, ii, jj, lengths, tables, sizes, SCORE)
    if SCORE is not None:
        t = from_base(t, base)
    p = tl.where(seen, tl.exp2(t * LOG2E - l2), 0.0)
    ds = p * (dp - d)
    if PULL is None:
        du = ds
    else:
        du = PULL(ds, s, b, h, ii, jj, lengths, tables, sizes) + tl.zeros_like(s)
    return p, tl.where(seen, du, 0.0)


@triton.jit
def modified_dq_kernel(
    q, k, v, out, dout, dq, lse2, delta, base, lse, dlse, cu_q, cu_k, used_q, used_k, counts, listed, t0, t1, t2, t3,
    q_b: "i64", q_r: "i64", q_h: "i64", k_b: "i64", k_r: "i64", k_h: "i64", v_b: "i64", v_r: "i64", v_h: "i64",
    o_b: "i64", o_r: "i64", o_h: "i64", do_b: "i64", do_r: "i64", do_h: "i64", dq_b: "i64", dq_r: "i64", dq_h: "i64",
    lse_b: "i64", lse_h: "i64", dlse_b: "i64", dlse_h: "i64", q_c, k_c, v_c, o_c, do_c, dq_c, lse_r, dlse_r,
    counts_b, counts_h, listed_r,
    heads, nheads, group, tiles, block, rows_q, rows_k, seqlen_k, headdim, headdim_v, used, left, right,
    programs, slots,
    n00: "i64", n01: "i64", n02: "i64", n03: "i64", n10: "i64", n11: "i64", n12: "i64", n13: "i64",
    n20: "i64", n21: "i64", n22: "i64", n23: "i64", n30: "i64", n31: "i64", n32: "i64", n33: "i64",
    scale: "fp32",
    ROWS: tl.constexpr, KEYS: tl.constexpr, COLS: tl.constexpr, COLS_V: tl.constexpr, EVEN: tl.constexpr,
    UNIT: tl.constexpr, WIDE: tl.constexpr, WINDOW: tl.constexpr, LISTED: tl.constexpr, PRECISION: tl.constexpr,
    SCORE: tl.constexpr, PULL: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """dq, and lse2 and delta (batch_q, nheads, rows_q), as dq_kernel of backward.py."""
    headdim *= UNIT
    headdim_v *= UNIT
    pid = tl.program_id(0)
    if cu_q is not None:
        if pid >= programs:
            row = (pid - programs) * ROWS + tl.arange(0, ROWS)
            outside = is_outside(cu_q, heads // nheads, row, rows_q)
            if tl.max(outside.to(tl.int32), 0) > 0:
                clear_rows(dq, row, outside, nheads, dq_r * UNIT, dq_h * UNIT, dq_c, headdim, ROWS, COLS)
                for h in range(nheads):
                    at = lse2 + (rows_q * (q_b * 0 + h)) + row
                    tl.store(at, tl.full((ROWS,), float("inf"), tl.float32), mask=outside)
            return
    tile, b, h = place_of(pid, tiles, block, heads, nheads, slots, cu_q, rows_q, 1, ROWS, True)
    head_k = h // group
    q_batch, q_first, rows, seqlen_q = query_rows(b, cu_q, used_q, rows_q)
    m0 = tile * ROWS
    if (tile < 0) | (m0 >= rows):
        return
    k_batch, k_first, count = key_rows(
        b, cu_k, used_k, None, None, None, rows_k, 1, seqlen_k, used, None, None, None, False
    )
    i = m0 + tl.arange(0, ROWS)
    valid = i < seqlen_q
    known = i < rows
    ii = position(i, seqlen_q)[:, None]
    lengths = (seqlen_q, count, q_first, k_first)
    tables = (t0, t1, t2, t3)
    sizes = ((n00, n01, n02, n03), (n10, n11, n12, n13), (n20, n21, n22, n23), (n30, n31, n32, n33))
    q_at = q + (q_batch.to(tl.int64) * q_b + h.to(tl.int64) * q_h) * UNIT
    o_at = out + (q_batch.to(tl.int64) * o_b + h.to(tl.int64) * o_h) * UNIT
    do_at = dout + (q_batch.to(tl.int64) * do_b + h.to(tl.int64) * do_h) * UNIT
    queries = load_rows(q_at, q_first, i, valid, q_r, q_c, headdim, COLS, EVEN, UNIT)
    grads = load_rows(do_at, q_first, i, valid, do_r, do_c, headdim_v, COLS_V, EVEN, UNIT)
    outs = load_rows(o_at, q_first, i, valid, o_r, o_c, headdim_v, COLS_V, EVEN, UNIT)
    row = (q_first + i).to(tl.int64)
    natural = tl.load(lse + q_batch.to(tl.int64) * lse_b + h.to(tl.int64) * lse_h + row * lse_r,
                      mask=valid, other=float("inf"))  # fmt: skip
    of_lse = tl.zeros((ROWS,), tl.float32)
    if dlse is not None:
        of_lse = tl.load(dlse + q_batch.to(tl.int64) * dlse_b + h.to(tl.int64) * dlse_h + row * dlse_r,
                         mask=valid, other=0.0)  # fmt: skip
    l2, d, of_row = row_statistics(outs, grads, natural, of_lse, base is not None)
    stats = (q_batch.to(tl.int64) * nheads + h) * rows_q + q_first
    tl.store(delta + stats + i, d, mask=known)

    k_at = k + (k_batch.to(tl.int64) * k_b + head_k.to(tl.int64) * k_h) * UNIT
    v_at = v + (k_batch.to(tl.int64) * v_b + head_k.to(tl.int64) * v_h) * UNIT
    start, full, stop, end = key_tiles(
        m0, tl.minimum(m0 + ROWS, seqlen_q) - 1, seqlen_q, count, left, right, None, WINDOW, KEYS
    )
    lo, hi = row_interval(i + count - seqlen_q, count, left, right, None, WINDOW)
    many = (end - start) // KEYS
    list_at = listed
    if LISTED:
        line = (b * counts_b + h * counts_h + m0 // ROWS).to(tl.int64)
        many = tl.load(counts + line)
        list_at = listed + line * listed_r
    if m0 >= seqlen_q:
        many = 0
    if base is not None:
        if tl.max((of_row != 0).to(tl.int32), 0) > 0:
            total = tl.zeros((ROWS,), tl.float32)
            for index in range(many):
                n, is_whole = next_tile(index, start, list_at, counts, KEYS, LISTED)
                keys = load_tile(k_at, n, k_first, count, None, None, None, k_b, k_r, k_c, headdim,
                                 KEYS, COLS, EVEN, True, 0, UNIT, WIDE)  # fmt: skip
                s = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale
                j = (n + tl.arange(0, KEYS))[None, :]
                jj = position(j, count)
                seen = is_visible(
                    b, h, i[:, None], j, ii, jj, lo[:, None], hi[:, None], is_whole, lengths, tables, sizes, MASK
                )
                s = from_base(modified(s, b, h, ii, jj, lengths, tables, sizes, SCORE), of_row[:, None])
                total += tl.sum(tl.where(seen, tl.exp2(s * LOG2E - l2[:, None]), 0.0), 1)
            l2 = with_sums(l2, of_row, total)
        tl.store(base + stats + i, of_row, mask=known)
    tl.store(lse2 + stats + i, l2, mask=known)
    acc = tl.zeros((ROWS, COLS), tl.float32)
    for index in tl.range(0, many):
        n, is_whole = next_tile(index, start, list_at, counts, KEYS, LISTED)
        keys = load_tile(k_at, n, k_first, count, None, None, None, k_b, k_r, k_c, headdim,
                         KEYS, COLS, EVEN, True, 0, UNIT, WIDE)  # fmt: skip
        values = load_tile(v_at, n, k_first, count, None, None, None, v_b, v_r, v_c, headdim_v,
                           KEYS, COLS_V, EVEN, True, 0, UNIT, WIDE)  # fmt: skip
        s = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale
        dp = tl.dot(grads, tl.trans(values), input_precision=PRECISION)
        j = (n + tl.arange(0, KEYS))[None, :]
        jj = position(j, count)
        seen = is_visible(b, h, i[:, None], j, ii, jj, lo[:, None], hi[:, None], is_whole, lengths, tables, sizes, MASK)
        p, du = gradient_of_scores(
            s, dp, l2[:, None], of_row[:, None], d[:, None], seen, b, h, ii, jj, lengths, tables, sizes, SCORE, PULL
        )
        acc = tl.dot(du.to(keys.dtype), keys, acc, input_precision=PRECISION)

    if any_nan(acc):  # once more, key by key
        acc = tl.zeros((ROWS, COLS), tl.float32)
        hidden = never(nheads)
        for index in range(many * KEYS):
            n, is_whole = next_tile(index // KEYS, start, list_at, counts, KEYS, LISTED)
            n += index % KEYS
            queries = load_rows(q_at, q_first, i + hidden, valid, q_r, q_c, headdim, COLS, EVEN, UNIT)
            grads = load_rows(do_at, q_first, i + hidden, valid, do_r, do_c, headdim_v, COLS_V, EVEN, UNIT)
            keys = load_tile(k_at, n, k_first, count, None, None, None, k_b, k_r, k_c, headdim,
                             1, COLS, EVEN, True, 0, UNIT, WIDE).to(tl.float32)  # fmt: skip
            values = load_tile(v_at, n, k_first, count, None, None, None, v_b, v_r, v_c, headdim_v,
                               1, COLS_V, EVEN, True, 0, UNIT, WIDE).to(tl.float32)  # fmt: skip
            s = tl.sum(queries.to(tl.float32) * keys, 1)[:, None] * scale
            dp = tl.sum(grads.to(tl.float32) * values, 1)[:, None]
            j = n + tl.zeros((1, 1), tl.int32)
            jj = position(j, count)
            seen = is_visible(
                b, h, i[:, None], j, ii, jj, lo[:, None], hi[:, None], is_whole, lengths, tables, sizes, MASK
            )
            p, du = gradient_of_scores(
                s, dp, l2[:, None], of_row[:, None], d[:, None], seen, b, h, ii, jj, lengths, tables, sizes, SCORE, PULL
            )
            acc += tl.where(seen, du * keys, 0.0)
    to = dq + (q_batch.to(tl.int64) * dq_b + h.to(tl.int64) * dq_h) * UNIT
    store_tile(to, q_first + i, known, dq_r, dq_c, headdim, acc * scale, COLS, UNIT)


@triton.jit
def modified_dkdv_kernel(
    q, k, v, dout, dk, dv, lse2, delta, base, cu_q, cu_k, used_q, used_k, counts, listed, t0, t1, t2, t3,
    q_b: "i64", q_r: "i64", q_h: "i64", k_b: "i64", k_r: "i64", k_h: "i64", v_b: "i64", v_r: "i64", v_h: "i64",
    do_b: "i64", do_r: "i64", do_h: "i64", dk_b: "i64", dk_r: "i64", dk_h: "i64", dv_b: "i64", dv_r: "i64", dv_h: "i64",
    q_c, k_c, v_c, do_c, dk_c, dv_c, counts_b, counts_h, listed_r,
    heads, nheads, group, tiles, block, rows_q, rows_k, seqlen_k, headdim, headdim_v, used, left, right,
    programs, slots,
    n00: "i64", n01: "i64", n02: "i64", n03: "i64", n10: "i64", n11: "i64", n12: "i64", n13: "i64",
    n20: "i64", n21: "i64", n22: "i64", n23: "i64", n30: "i64", n31: "i64", n32: "i64", n33: "i64",
    scale: "fp32",
    ROWS: tl.constexpr, KEYS: tl.constexpr, COLS: tl.constexpr, COLS_V: tl.constexpr, EVEN: tl.constexpr,
    UNIT: tl.constexpr, WIDE: tl.constexpr, WINDOW: tl.constexpr, LISTED: tl.constexpr, PRECISION: tl.constexpr,
    SCORE: tl.constexpr, PULL: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """dk and dv, by keys: scores are transposed, (KEYS, ROWS). The lists are by tiles of keys."""
    headdim *= UNIT
    headdim_v *= UNIT
    nheads_k = nheads // group
    pid = tl.program_id(0)
    if cu_k is not None:
        if pid >= programs:
            row = (pid - programs) * KEYS + tl.arange(0, KEYS)
            outside = is_outside(cu_k, heads // nheads_k, row, rows_k)
            if tl.max(outside.to(tl.int32), 0) > 0:
                clear_rows(dk, row, outside, nheads_k, dk_r * UNIT, dk_h * UNIT, dk_c, headdim, KEYS, COLS)
                clear_rows(dv, row, outside, nheads_k, dv_r * UNIT, dv_h * UNIT, dv_c, headdim_v, KEYS, COLS_V)
            return
    tile, b, head_k = place_of(pid, tiles, block, heads, nheads_k, slots, cu_k, rows_k, 1, KEYS, False)
    k_batch, k_first, count = key_rows(
        b, cu_k, used_k, None, None, None, rows_k, 1, seqlen_k, used, None, None, None, False
    )
    n0 = tile * KEYS
    if (tile < 0) | (n0 >= count):
        return
    q_batch, q_first, rows, seqlen_q = query_rows(b, cu_q, used_q, rows_q)
    j = n0 + tl.arange(0, KEYS)
    known = j < count
    jj = position(j, count)[:, None]
    lengths = (seqlen_q, count, q_first, k_first)
    tables = (t0, t1, t2, t3)
    sizes = ((n00, n01, n02, n03), (n10, n11, n12, n13), (n20, n21, n22, n23), (n30, n31, n32, n33))
    k_at = k + (k_batch.to(tl.int64) * k_b + head_k.to(tl.int64) * k_h) * UNIT
    v_at = v + (k_batch.to(tl.int64) * v_b + head_k.to(tl.int64) * v_h) * UNIT
    keys = load_rows(k_at, k_first, j, known, k_r, k_c, headdim, COLS, EVEN, UNIT)
    values = load_rows(v_at, k_first, j, known, v_r, v_c, headdim_v, COLS_V, EVEN, UNIT)
    start, full, stop, end = row_tiles(
        n0, tl.minimum(n0 + KEYS, count) - 1, seqlen_q, count, left, right, None, WINDOW, ROWS
    )
    acc_k = tl.zeros((KEYS, COLS), tl.float32)
    acc_v = tl.zeros((KEYS, COLS_V), tl.float32)
    for g in range(group):
        h = head_k * group + g
        q_at = q + (q_batch.to(tl.int64) * q_b + h.to(tl.int64) * q_h) * UNIT
        do_at = dout + (q_batch.to(tl.int64) * do_b + h.to(tl.int64) * do_h) * UNIT
        stats = (q_batch.to(tl.int64) * nheads + h) * rows_q + q_first
        many = (end - start) // ROWS
        list_at = listed
        if LISTED:
            line = (b * counts_b + h * counts_h + n0 // KEYS).to(tl.int64)
            many = tl.load(counts + line)
            list_at = listed + line * listed_r
        for index in tl.range(0, many):
            m, is_whole = next_tile(index, start, list_at, counts, ROWS, LISTED)
            i = m + tl.arange(0, ROWS)
            queries = load_tile(q_at, m, q_first, seqlen_q, None, None, None, q_b, q_r, q_c, headdim,
                                ROWS, COLS, EVEN, True, 0, UNIT, WIDE)  # fmt: skip
            grads = load_tile(do_at, m, q_first, seqlen_q, None, None, None, do_b, do_r, do_c, headdim_v,
                              ROWS, COLS_V, EVEN, True, 0, UNIT, WIDE)  # fmt: skip
            l2 = tl.load(lse2 + stats + i, mask=i < seqlen_q, other=float("inf"))
            d = tl.load(delta + stats + i, mask=i < seqlen_q, other=0.0)
            of_base = None
            if base is not None:
                of_base = tl.load(base + stats + i, mask=i < seqlen_q, other=0.0)[None, :]
            s = tl.dot(keys, tl.trans(queries), input_precision=PRECISION) * scale
            dp = tl.dot(values, tl.trans(grads), input_precision=PRECISION)
            ii = position(i, seqlen_q)[None, :]
            lo, hi = row_interval(i + count - seqlen_q, count, left, right, None, WINDOW)
            seen = is_visible(
                b, h, i[None, :], j[:, None], ii, jj, lo[None, :], hi[None, :], is_whole, lengths, tables, sizes, MASK
            )
            seen &= i[None, :] < seqlen_q  # rows past the last: the function of their score, 0, may be no number
            p, du = gradient_of_scores(
                s, dp, l2[None, :], of_base, d[None, :], seen, b, h, ii, jj, lengths, tables, sizes, SCORE, PULL
            )
            acc_v = tl.dot(p.to(grads.dtype), grads, acc_v, input_precision=PRECISION)
            acc_k = tl.dot(du.to(queries.dtype), queries, acc_k, input_precision=PRECISION)

    if any_nan(acc_k) | any_nan(acc_v):  # once more, row by row
        acc_k = tl.zeros((KEYS, COLS), tl.float32)
        acc_v = tl.zeros((KEYS, COLS_V), tl.float32)
        hidden = never(nheads)
        for g in range(group):
            h = head_k * group + g
            q_at = q + (q_batch.to(tl.int64) * q_b + h.to(tl.int64) * q_h) * UNIT
            do_at = dout + (q_batch.to(tl.int64) * do_b + h.to(tl.int64) * do_h) * UNIT
            stats = (q_batch.to(tl.int64) * nheads + h) * rows_q + q_first
            many = (end - start) // ROWS
            list_at = listed
            if LISTED:
                line = (b * counts_b + h * counts_h + n0 // KEYS).to(tl.int64)
                many = tl.load(counts + line)
                list_at = listed + line * listed_r
            for index in range(many * ROWS):
                m, is_whole = next_tile(index // ROWS, start, list_at, counts, ROWS, LISTED)
                m += index % ROWS
                i = m + tl.zeros((1, 1), tl.int32)
                keys = load_rows(k_at, k_first, j + hidden, known, k_r, k_c, headdim, COLS, EVEN, UNIT)
                values = load_rows(v_at, k_first, j + hidden, known, v_r, v_c, headdim_v, COLS_V, EVEN, UNIT)
                query = load_tile(q_at, m, q_first, seqlen_q, None, None, None, q_b, q_r, q_c, headdim,
                                  1, COLS, EVEN, True, 0, UNIT, WIDE).to(tl.float32)  # fmt: skip
                grad = load_tile(do_at, m, q_first, seqlen_q, None, None, None, do_b, do_r, do_c, headdim_v,
                                 1, COLS_V, EVEN, True, 0, UNIT, WIDE).to(tl.float32)  # fmt: skip
                l2 = tl.load(lse2 + stats + m, mask=m < seqlen_q, other=float("inf"))
                d = tl.load(delta + stats + m, mask=m < seqlen_q, other=0.0)
                of_base = None
                if base is not None:
                    of_base = tl.load(base + stats + m, mask=m < seqlen_q, other=0.0)
                s = tl.sum(keys.to(tl.float32) * query, 1)[:, None] * scale
                dp = tl.sum(values.to(tl.float32) * grad, 1)[:, None]
                ii = position(i, seqlen_q)
                lo, hi = row_interval(i + count - seqlen_q, count, left, right, None, WINDOW)
                seen = is_visible(b, h, i, j[:, None], ii, jj, lo, hi, is_whole, lengths, tables, sizes, MASK)
                seen &= i < seqlen_q
                p, du = gradient_of_scores(
                    s, dp, l2, of_base, d, seen, b, h, ii, jj, lengths, tables, sizes, SCORE, PULL
                )
                acc_v += tl.where(seen, p * grad, 0.0)
                acc_k += tl.where(seen, du * query, 0.0)

    to_k = dk + (k_batch.to(tl.int64) * dk_b + head_k.to(tl.int64) * dk_h) * UNIT
    store_tile(to_k, k_first + j, known, dk_r, dk_c, headdim, acc_k * scale, COLS, UNIT)
    to_v = dv + (k_batch.to(tl.int64) * dv_b + head_k.to(tl.int64) * dv_h) * UNIT
    store_tile(to_v, k_first + j, known, dv_r, dv_c, headdim_v, acc_v, COLS_V, UNIT)
