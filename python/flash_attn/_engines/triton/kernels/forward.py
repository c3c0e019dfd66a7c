"""out_i = sum_j Z_j P_j v_j, tile by tile with a running softmax.

A program owns ROWS rows of one head (PACK: of one key head, the queries of its whole group, row r being query
r // group of head r % group) and passes over the keys that they see: first the tiles that every row sees whole, without
any mask, then the edges. SPLIT: over one of several parts of them; combine.py joins the parts.

Per tile of 128 x 64 at headdim 128: 4.2 MFLOP on the tensor cores, 8192 exponentials (a quarter of the time of the
products on an H100), and as few other operations per score as can be: one max, one multiply-add, one sum.
"""

import triton
import triton.language as tl

from .dropout import kept, kept_one, seed_of
from .mask import key_tiles, row_interval, tile_at, tile_count
from .rotary import first_position, rotate
from .scores import LOG2E, natural_scores
from .sequences import (
    clamp,
    clear_rows,
    is_outside,
    key_rows,
    load_tile,
    pages_at,
    place_of,
    query_rows,
)  # fmt: skip


@triton.jit
def any_nan(x):
    """In one reduction: of two, one after the other, Triton 3.6 makes no code for sm_100."""
    return tl.max(tl.ravel((x != x).to(tl.int32), can_reorder=True), 0) > 0


@triton.jit
def query_offsets(r, first, group, stride_row, stride_head, PACK: tl.constexpr, UNIT: tl.constexpr):
    """Of rows r from the tile's first row."""
    if PACK:
        i = (r // group - first // group).to(tl.int64)
        return (i * stride_row + (r % group).to(tl.int64) * stride_head) * UNIT
    else:
        return (r - first).to(tl.int64) * stride_row * UNIT


@triton.jit
def never(x):
    """0, for x >= 0; but the compiler does not know. What the careful pass computes from it once more is then not kept
    in registers through the loops before, which need them."""
    return (x < 0).to(tl.int32)


@triton.jit
def load_queries(
    where, known, at, size, stride_col, cos, sin, cos_r, cos_c, sin_r, sin_c, rows_cos, pairs,
    COLS: tl.constexpr, EVEN: tl.constexpr, INTERLEAVED: tl.constexpr, SIGN: tl.constexpr,
):  # fmt: skip
    """Rows at the addresses `where` (ROWS, 1) -> (ROWS, COLS), rotated if there is a table."""
    cols = tl.arange(0, COLS)
    if cos is not None:
        queries = rotate(
            where, known, cols, size, stride_col, at, cos, sin, cos_r, cos_c, sin_r, sin_c, rows_cos, pairs,
            INTERLEAVED,
        )  # fmt: skip
    else:
        if stride_col is None:
            where += cols[None, :]
        else:
            where += cols.to(tl.int64)[None, :] * stride_col
        if EVEN:
            queries = tl.load(where, mask=known[:, None], other=0.0)
        else:
            queries = tl.load(where, mask=known[:, None] & (cols < size)[None, :], other=0.0)
    if SIGN != 1:  # a scale that is not positive: its sign goes to q
        queries = (queries.to(tl.float32) * SIGN).to(queries.dtype)
    return queries


@triton.jit
def forward_kernel(
    q, k, v, out, lse, out_parts, lse_parts, sums_parts,
    cu_q, cu_k, used_q, used_k, leftpad, entry, pages, cu_new, alibi, bias, sink, cos, sin, positions, state,
    q_b: "i64", q_r: "i64", q_h: "i64", k_b: "i64", k_r: "i64", k_h: "i64",
    v_b: "i64", v_r: "i64", v_h: "i64", o_b: "i64", o_r: "i64", o_h: "i64", lse_b: "i64", lse_h: "i64",
    q_c, k_c, v_c, o_c, lse_r,
    heads, nheads, group, tiles, block, rows_q, rows_k, seqlen_k, headdim, headdim_v,
    batch_k, used, seqlen_new, rows_new, max_new, page_size, pages_b, left, right, chunk, splits, programs, slots,
    alibi_b, alibi_h, bias_b, bias_h, bias_r, bias_c, bias_rows, bias_keys, sink_h,
    cos_r, cos_c, sin_r, sin_c, rows_cos, pairs, advance, threshold, seed: "i64", offset: "i64",
    factor: "fp32", scale: "fp32", softcap, drop_scale, empty_lse: "fp32",
    ROWS: tl.constexpr, KEYS: tl.constexpr, COLS: tl.constexpr, COLS_V: tl.constexpr, EVEN: tl.constexpr,
    UNIT: tl.constexpr, WIDE: tl.constexpr, MASK: tl.constexpr, PAGED: tl.constexpr, PACK: tl.constexpr,
    SPLIT: tl.constexpr, INTERLEAVED: tl.constexpr, SIGN: tl.constexpr, PRECISION: tl.constexpr,
    FIRST: tl.constexpr,
):  # fmt: skip
    """q (batch, row, head, col) and so on; lse (batch, head, row); headdim in units; heads = batch * heads of the grid.

    factor: of raw scores in base 2, > 0. scale: of raw scores in the natural base; with softcap, ALiBi or bias, of q.k.
    FIRST: 0, a loop over the interior and one over the edges; 2, one loop over all tiles.
    programs: of the grid, but for those that fill rows of no sequence. slots: see place_of.
    """
    headdim *= UNIT
    headdim_v *= UNIT
    pid = tl.program_id(0)
    rows_of = tl.arange(0, ROWS)
    cols_v = tl.arange(0, COLS_V)

    sequences = heads // (nheads // group if PACK else nheads)
    if cu_q is not None:  # programs behind the others: rows of no sequence, ROWS of them for all heads
        if pid >= programs:
            row = (pid - programs) * ROWS + rows_of
            outside = is_outside(cu_q, sequences, row, rows_q)
            if tl.max(outside.to(tl.int32), 0) > 0:
                if SPLIT:
                    at = row.to(tl.int64) * nheads
                    for s in range(splits * nheads):  # part s // nheads, head s % nheads
                        here = lse_parts + at + (q_b * 0 + rows_q) * nheads * (s // nheads) + s % nheads
                        tl.store(here, tl.full((ROWS,), float("inf"), tl.float32), mask=outside)
                else:
                    clear_rows(out, row, outside, nheads, o_r * UNIT, o_h * UNIT, o_c, headdim_v, ROWS, COLS_V)
                    if lse is not None:
                        for h in range(nheads):
                            to_lse = lse + lse_h * h + row.to(tl.int64) * lse_r
                            tl.store(to_lse, tl.zeros((ROWS,), tl.float32) + empty_lse, mask=outside)
            return

    part = pid * 0
    if SPLIT:
        part = pid % splits
        pid = pid // splits
    packed = group if PACK else 1
    tile, b, head = place_of(pid, tiles, block, heads, nheads // packed, slots, cu_q, rows_q, packed, ROWS, True)
    head_k = head if PACK else head // group

    q_batch, q_first, rows, seqlen_q = query_rows(b, cu_q, used_q, rows_q)
    r = tile * ROWS + rows_of
    if PACK:
        if (tile < 0) | (tile * ROWS >= rows * group):
            return
        i = r // group
        h = head_k * group + r % group
        i_first = tile * ROWS // group
        i_last = (tile * ROWS + ROWS - 1) // group
    else:
        if (tile < 0) | (tile * ROWS >= rows):
            return
        i = r
        h = rows_of * 0 + head
        i_first = tile * ROWS
        i_last = tile * ROWS + ROWS - 1
    k_batch, k_first, count = key_rows(
        b, cu_k, used_k, leftpad, entry, cu_new, rows_k, batch_k, seqlen_k, used, seqlen_new, rows_new, max_new,
        PAGED > 0,
    )  # fmt: skip
    valid = i < seqlen_q
    position = i + count - seqlen_q

    q_at = q + (q_batch.to(tl.int64) * q_b + (q_first + i_first).to(tl.int64) * q_r) * UNIT
    if PACK:
        q_at += head_k.to(tl.int64) * group * q_h * UNIT
    else:
        q_at += head.to(tl.int64) * q_h * UNIT
    along = query_offsets(r, tile * ROWS, group, q_r, q_h, PACK, UNIT)
    at = i
    if cos is not None:
        at = first_position(b, positions, used_k, used) + i * advance
    queries = load_queries(
        q_at + along[:, None], valid, at, headdim, q_c, cos, sin, cos_r, cos_c, sin_r, sin_c, rows_cos, pairs,
        COLS, EVEN, INTERLEAVED, SIGN,
    )  # fmt: skip

    # keys
    k_at = k + (head_k.to(tl.int64) * k_h) * UNIT
    v_at = v + (head_k.to(tl.int64) * v_h) * UNIT
    table = pages
    if PAGED > 0:
        table = pages + b.to(tl.int64) * pages_b
    else:
        k_at += k_batch.to(tl.int64) * k_b * UNIT
        v_at += k_batch.to(tl.int64) * v_b * UNIT
    start, full, stop, end = key_tiles(
        i_first, tl.minimum(i_last, seqlen_q - 1), seqlen_q, count, left, right, chunk, MASK, KEYS
    )
    if i_first >= seqlen_q:
        end = start
        full = start
        stop = start
    if SPLIT:  # a part has its share of the tiles
        share = ((end - start) // KEYS + splits - 1) // splits * KEYS
        start = tl.minimum(start + part * share, end)
        end = tl.minimum(start + share, end)
        full = clamp(full, start, end)
        stop = clamp(stop, full, end)
    lo, hi = row_interval(position, count, left, right, chunk, MASK)
    plane = b * nheads + h
    if threshold is not None:
        k0, k1, last = seed_of(state, seed, offset)

    PLAIN: tl.constexpr = softcap is None and alibi is None and bias is None
    # One multiply-add per score rounds factor * m, not factor * s: an error of half an ulp of the largest exponent,
    # common to the row, which the sum divides out. Where exponents exceed 2^24 it would overflow: there the factor is a
    # power of two, which is exact, and what is not the largest is 0 anyway.
    power = tl.exp2(tl.floor(tl.log2(factor)))
    limit = 16777216.0 / factor
    # The largest raw score so far. The lowest float stands for "none yet": no score is below it, and it is finite, so
    # that a row of -inf needs no case of its own. (Lowered where the factor is above 1: their product must be finite.)
    m = tl.zeros((ROWS,), tl.float32) - 3.4028234663852886e38 / tl.maximum(power, 1.0)
    l = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, COLS_V), tl.float32)
    for EDGE in tl.static_range(FIRST, FIRST // 2 + 2):
        ahead = pages_at(table, tile_at(0, start, full, stop, KEYS, EDGE), k_first, count, page_size, KEYS, PAGED)
        for index in tl.range(0, tile_count(start, full, stop, end, KEYS, EDGE)):
            n = tile_at(index, start, full, stop, KEYS, EDGE)
            here = ahead
            ahead = pages_at(
                table, tile_at(index + 1, start, full, stop, KEYS, EDGE), k_first, count, page_size, KEYS, PAGED
            )
            keys = load_tile(k_at, n, k_first, count, here, page_size, batch_k, k_b, k_r, k_c, headdim,
                             KEYS, COLS, EVEN, EDGE > 0, PAGED, UNIT, WIDE)  # fmt: skip
            s = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
            j = n + tl.arange(0, KEYS)[None, :]
            if not PLAIN:
                s, t = natural_scores(
                    s, i[:, None], j, position[:, None], h[:, None], b, seqlen_q, count, scale, softcap,
                    alibi, alibi_b, alibi_h, bias, bias_b, bias_h, bias_r, bias_c, bias_rows, bias_keys,
                    PRECISION != "tf32",
                )  # fmt: skip
            if EDGE == 1:
                s = tl.where((j >= lo[:, None]) & (j < hi[:, None]), s, float("-inf"))
            elif EDGE == 2:
                if (n < full) | (n >= stop):
                    s = tl.where((j >= lo[:, None]) & (j < hi[:, None]), s, float("-inf"))
            m_new = tl.maximum(m, tl.max(s, 1))
            times = tl.where(tl.abs(m_new) < limit, factor, power)
            p = tl.exp2(tl.fma(s, times[:, None], -(m_new * times)[:, None]))
            shrink = tl.exp2((m - m_new) * factor)
            l = l * shrink + tl.sum(p, 1)
            acc = acc * shrink[:, None]
            if threshold is not None:
                p = tl.where(kept(i, n, plane, k0, k1, last, threshold, ROWS, KEYS), p, 0.0)
            values = load_tile(v_at, n, k_first, count, here, page_size, batch_k, v_b, v_r, v_c, headdim_v,
                               KEYS, COLS_V, EVEN, EDGE > 0, PAGED, UNIT, WIDE)  # fmt: skip
            acc = tl.dot(p.to(values.dtype), values, acc, input_precision=PRECISION)
            m = m_new

    if MASK > 0:
        # A value that is no number has met a probability of 0 in the rows of its tile that do not see it: 0 times NaN
        # is NaN. Then there is a NaN in acc, and all is done once more, key by key, slowly; m and l are right already.
        # Without tensor cores, whose registers the compiler would take from the loop above.
        if any_nan(acc):
            acc = tl.zeros((ROWS, COLS_V), tl.float32)
            times = tl.where(tl.abs(m) < limit, factor, power)
            hidden = never(nheads)
            BY_KEY: tl.constexpr = 1 if PAGED > 0 else 0
            along = query_offsets(r + hidden, tile * ROWS, group, q_r, q_h, PACK, UNIT)
            for n in range(start, tl.minimum(end, count)):
                queries = load_queries(
                    q_at + along[:, None], valid, at, headdim + hidden, q_c, cos, sin, cos_r, cos_c, sin_r, sin_c,
                    rows_cos, pairs, COLS, EVEN, INTERLEAVED, SIGN,
                )  # fmt: skip
                here = pages_at(table, n, k_first, count, page_size, 1, BY_KEY)
                keys = load_tile(k_at, n, k_first, count, here, page_size, batch_k, k_b, k_r, k_c, headdim,
                                 1, COLS, EVEN, True, BY_KEY, UNIT, WIDE)  # fmt: skip
                values = load_tile(v_at, n, k_first, count, here, page_size, batch_k, v_b, v_r, v_c, headdim_v,
                                   1, COLS_V, EVEN, True, BY_KEY, UNIT, WIDE)  # fmt: skip
                s = tl.sum(queries.to(tl.float32) * keys.to(tl.float32), 1)[:, None]
                j = n + tl.zeros((1, 1), tl.int32)
                if not PLAIN:
                    s, t = natural_scores(
                        s, i[:, None], j, position[:, None], h[:, None], b, seqlen_q, count, scale, softcap,
                        alibi, alibi_b, alibi_h, bias, bias_b, bias_h, bias_r, bias_c, bias_rows, bias_keys,
                        PRECISION != "tf32",
                    )  # fmt: skip
                p = tl.exp2(tl.fma(s, times[:, None], -(m * times)[:, None]))
                if threshold is not None:
                    p = tl.where(kept_one(i, n, plane, k0, k1, last, threshold, ROWS), p, 0.0)
                visible = (j >= lo[:, None]) & (j < hi[:, None])
                acc += tl.where(visible, p * values.to(tl.float32), 0.0)

    # natural logarithms from here on; a row has seen something if its sum is not 0 (NaN included)
    top = m * (scale if PLAIN else 1.0)
    if sink is not None and not SPLIT:
        logit = tl.load(sink + h * sink_h).to(tl.float32)
        most = tl.maximum(top, logit)
        most_or_0 = tl.where(most == float("-inf"), 0.0, most)
        shrink = tl.exp2((top - most_or_0) * LOG2E)
        l = l * shrink + tl.exp2((logit - most_or_0) * LOG2E)
        acc = acc * shrink[:, None]
        top = most
    seen = valid & (l != 0)
    weight = 1.0 / tl.where(seen, l, 1.0)
    if threshold is not None:
        weight *= drop_scale
    acc = tl.where(seen[:, None], acc * weight[:, None], 0.0)
    row_lse = top + tl.log(l)
    row_q = q_first + i
    known = i < rows
    if SPLIT:
        memory = rows_q if cu_q is not None else sequences * rows_q
        at = (part.to(tl.int64) * memory + q_batch.to(tl.int64) * rows_q + row_q) * nheads + h
        unseen = tl.where(valid, float("-inf"), float("inf"))
        if sums_parts is None:
            tl.store(lse_parts + at, tl.where(seen, row_lse, unseen), mask=known)
        else:  # a bias: combine.py
            tl.store(lse_parts + at, tl.where(seen, top, unseen), mask=known)
            tl.store(sums_parts + at, l, mask=known)
        to = out_parts + (at * headdim_v)[:, None] + cols_v[None, :]
        tl.store(to, acc, mask=seen[:, None] & (cols_v < headdim_v)[None, :])
    else:
        to = out + q_batch.to(tl.int64) * o_b * UNIT
        to = to + ((row_q.to(tl.int64) * o_r + h.to(tl.int64) * o_h) * UNIT)[:, None]
        if o_c is None:
            to += cols_v[None, :]
        else:
            to += cols_v.to(tl.int64)[None, :] * o_c
        if EVEN:
            tl.store(to, acc.to(out.dtype.element_ty), mask=known[:, None])
        else:
            tl.store(to, acc.to(out.dtype.element_ty), mask=known[:, None] & (cols_v < headdim_v)[None, :])
        if lse is not None:
            to_lse = lse + q_batch.to(tl.int64) * lse_b + h.to(tl.int64) * lse_h + row_q.to(tl.int64) * lse_r
            tl.store(to_lse, tl.where(seen, row_lse, empty_lse), mask=known)
