"""dq, and dk with dv, by two kernels: seven products in all, no atomics, the same bits at every run.

Counted per tile of 64 x 64 at headdim 128: a fused kernel would do five products instead of seven, and add 32 KB of
dq in fp32 to memory for each tile, 6 bytes per kFLOP: more than memory has for tensor cores.
dq_kernel runs first: it owns ROWS rows and passes over keys, as the forward does; it has dout at hand, and computes
delta.
dkdv_kernel owns KEYS keys of one key head and passes over the rows that see them, of all query heads of the group. Its
scores are transposed, (keys, rows), so that P and dS come out of one product in the shape that the next one takes from
registers. Where dk and dv together would take all registers (headdim 256: 2 x 64 KB of 256 KB, for 64 keys), dk and dv
are computed one after the other (WHICH), with one product more and twice the keys.
"""

import triton
import triton.language as tl

from .dropout import kept, kept_one, seed_of
from .forward import any_nan, never
from .gradients import probabilities, row_statistics, score_gradients, with_sums
from .mask import is_near, key_tiles, row_interval, row_tiles, tile_at, tile_count
from .sequences import clear_rows, is_outside, key_rows, load_tile, place_of, query_rows, tile_offsets


@triton.jit
def store_tile(x, row, known, stride_row, stride_col, size, value, COLS: tl.constexpr, UNIT: tl.constexpr):
    """Rows `row` (ROWS) of one head; x: its first row's address."""
    cols = tl.arange(0, COLS)
    to = x + (row.to(tl.int64) * stride_row * UNIT)[:, None]
    if stride_col is None:
        to += cols[None, :]
    else:
        to += cols.to(tl.int64)[None, :] * stride_col
    tl.store(to, value.to(x.dtype.element_ty), mask=known[:, None] & (cols < size)[None, :])


@triton.jit
def load_rows(x, first, i, known, stride_row, stride_col, size, COLS: tl.constexpr, EVEN: tl.constexpr,
              UNIT: tl.constexpr):  # fmt: skip
    """Rows first + i (ROWS) of one head, (ROWS, COLS); x: its first row's address."""
    cols = tl.arange(0, COLS)
    where = x + first.to(tl.int64) * stride_row * UNIT
    where = where + tile_offsets(i, cols, stride_row, stride_col, UNIT, True)
    if EVEN:
        return tl.load(where, mask=known[:, None], other=0.0)
    else:
        return tl.load(where, mask=known[:, None] & (cols < size)[None, :], other=0.0)


@triton.jit
def column(x, c, stride_col):
    """The address of column c."""
    if stride_col is None:
        return x + c
    else:
        return x + stride_col * c


@triton.jit
def load_one(x, c, stride_col, size, PIECE: tl.constexpr):
    """Columns c + [0, PIECE) of the one row at address x, (1, PIECE), in fp32."""
    cols = tl.arange(0, PIECE)
    where = column(x, c, stride_col)
    if stride_col is None:
        where = where + cols
    else:
        where = where + cols.to(tl.int64) * stride_col
    return tl.load(where, mask=cols < size - c, other=0.0).to(tl.float32)[None, :]


@triton.jit
def products(
    x, first, i, known, stride_row, stride_col, y, stride_col_y, size, PIECE: tl.constexpr, UNIT: tl.constexpr
):
    """Rows first + i of x times the one row at address y -> (ROWS, 1): on vector units, by pieces of the columns, which
    take few registers. For the careful passes."""
    total = tl.zeros((i.shape[0],), tl.float32)
    for c in range(0, size, PIECE):
        rows = load_rows(
            column(x, c, stride_col), first, i, known, stride_row, stride_col, size - c, PIECE, False, UNIT
        )
        total += tl.sum(rows.to(tl.float32) * load_one(y, c, stride_col_y, size, PIECE), 1)
    return total[:, None]


@triton.jit
def dkdv_kernel(
    q, k, v, dout, dk, dv, lse2, delta, base,
    cu_q, cu_k, used_q, used_k, leftpad, alibi, bias, state,
    q_b: "i64", q_r: "i64", q_h: "i64", k_b: "i64", k_r: "i64", k_h: "i64", v_b: "i64", v_r: "i64", v_h: "i64",
    do_b: "i64", do_r: "i64", do_h: "i64", dk_b: "i64", dk_r: "i64", dk_h: "i64", dv_b: "i64", dv_r: "i64", dv_h: "i64",
    q_c, k_c, v_c, do_c, dk_c, dv_c,
    heads, nheads, group, tiles, block, rows_q, rows_k, seqlen_k, headdim, headdim_v, used, left, right, chunk,
    programs, slots, alibi_b, alibi_h, bias_b, bias_h, bias_r, bias_c, bias_rows, bias_keys, threshold,
    seed: "i64", offset: "i64", factor: "fp32", scale: "fp32", softcap, drop_scale,
    ROWS: tl.constexpr, KEYS: tl.constexpr, COLS: tl.constexpr, COLS_V: tl.constexpr, EVEN: tl.constexpr,
    UNIT: tl.constexpr, WIDE: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
    FIRST: tl.constexpr, WHICH: tl.constexpr,
):  # fmt: skip
    """heads = batch * nheads_k; factor, scale of q.k: of raw scores in base 2, and the softmax scale.

    WHICH: 0 dk and dv, 1 dk alone, 2 dv alone.
    """
    headdim *= UNIT
    headdim_v *= UNIT
    nheads_k = nheads // group
    pid = tl.program_id(0)
    if cu_k is not None:  # programs behind the others: keys of no sequence, KEYS of them for all heads
        if pid >= programs:
            row = (pid - programs) * KEYS + tl.arange(0, KEYS)
            outside = is_outside(cu_k, heads // nheads_k, row, rows_k)
            if tl.max(outside.to(tl.int32), 0) > 0:
                if WHICH != 2:
                    clear_rows(dk, row, outside, nheads_k, dk_r * UNIT, dk_h * UNIT, dk_c, headdim, KEYS, COLS)
                if WHICH != 1:
                    clear_rows(dv, row, outside, nheads_k, dv_r * UNIT, dv_h * UNIT, dv_c, headdim_v, KEYS, COLS_V)
            return
    tile, b, head_k = place_of(pid, tiles, block, heads, nheads_k, slots, cu_k, rows_k, 1, KEYS, False)
    k_batch, k_first, count = key_rows(
        b, cu_k, used_k, leftpad, None, None, rows_k, 1, seqlen_k, used, None, None, None, False
    )
    n = tile * KEYS
    if (tile < 0) | (n >= count):
        return
    q_batch, q_first, rows, seqlen_q = query_rows(b, cu_q, used_q, rows_q)

    k_at = k + (k_batch.to(tl.int64) * k_b + head_k.to(tl.int64) * k_h) * UNIT
    v_at = v + (k_batch.to(tl.int64) * v_b + head_k.to(tl.int64) * v_h) * UNIT
    j = n + tl.arange(0, KEYS)
    known = j < count
    keys = load_rows(k_at, k_first, j, known, k_r, k_c, headdim, COLS, EVEN, UNIT)
    if WHICH != 2:
        values = load_rows(v_at, k_first, j, known, v_r, v_c, headdim_v, COLS_V, EVEN, UNIT)
    start, full, stop, end = row_tiles(
        n, tl.minimum(n + KEYS, count) - 1, seqlen_q, count, left, right, chunk, MASK, ROWS
    )
    k0, k1, last = 0, 0, 0
    if threshold is not None:
        k0, k1, last = seed_of(state, seed, offset)

    if WHICH != 2:
        acc_k = tl.zeros((KEYS, COLS), tl.float32)
    if WHICH != 1:
        acc_v = tl.zeros((KEYS, COLS_V), tl.float32)
    for g in range(group):
        h = head_k * group + g
        q_at = q + (q_batch.to(tl.int64) * q_b + h.to(tl.int64) * q_h) * UNIT
        do_at = dout + (q_batch.to(tl.int64) * do_b + h.to(tl.int64) * do_h) * UNIT
        stats = (q_batch.to(tl.int64) * nheads + h) * rows_q + q_first
        for EDGE in tl.static_range(FIRST, FIRST // 2 + 2):
            for index in tl.range(0, tile_count(start, full, stop, end, ROWS, EDGE)):
                m = tile_at(index, start, full, stop, ROWS, EDGE)
                i = m + tl.arange(0, ROWS)
                queries = load_tile(q_at, m, q_first, seqlen_q, None, None, None, q_b, q_r, q_c, headdim,
                                    ROWS, COLS, EVEN, EDGE > 0, 0, UNIT, WIDE)  # fmt: skip
                if EDGE > 0:
                    l2 = tl.load(lse2 + stats + i, mask=i < seqlen_q, other=float("inf"))
                    d = tl.load(delta + stats + i, mask=i < seqlen_q, other=0.0)
                else:
                    l2 = tl.load(lse2 + stats + i)
                    d = tl.load(delta + stats + i)
                of_base = None
                if base is not None:
                    of_base = tl.load(base + stats + i, mask=i < seqlen_q, other=0.0)[None, :]
                s = tl.dot(keys, tl.trans(queries), input_precision=PRECISION)
                grads = load_tile(do_at, m, q_first, seqlen_q, None, None, None, do_b, do_r, do_c, headdim_v,
                                  ROWS, COLS_V, EVEN, EDGE > 0, 0, UNIT, WIDE)  # fmt: skip
                dp = s
                if WHICH != 2:
                    dp = tl.dot(values, tl.trans(grads), input_precision=PRECISION)
                position = i + count - seqlen_q
                p, t = probabilities(
                    s, l2[None, :], of_base, i[None, :], j[:, None], position[None, :], h, b,
                    seqlen_q, count, factor, scale, softcap,
                    alibi, alibi_b, alibi_h, bias, bias_b, bias_h, bias_r, bias_c, bias_rows, bias_keys,
                    PRECISION != "tf32",
                )  # fmt: skip
                if MASK > 0 and EDGE == 1:
                    p = tl.where(is_near(j[:, None], position[None, :], left, right, chunk, MASK), p, 0.0)
                elif MASK > 0 and EDGE == 2:
                    if (m < full) | (m >= stop):
                        p = tl.where(is_near(j[:, None], position[None, :], left, right, chunk, MASK), p, 0.0)
                stays = None
                if threshold is not None:
                    plane = tl.zeros((ROWS,), tl.int32) + (b * nheads + h)
                    stays = tl.trans(kept(i, n, plane, k0, k1, last, threshold, ROWS, KEYS).to(tl.int8)) != 0
                p, du, ds = score_gradients(p, t, dp, d[None, :], softcap, stays, drop_scale)
                if WHICH != 1:
                    acc_v = tl.dot(p.to(grads.dtype), grads, acc_v, input_precision=PRECISION)
                if WHICH != 2:
                    acc_k = tl.dot(du.to(queries.dtype), queries, acc_k, input_precision=PRECISION)

    if (
        MASK > 0
    ):  # a NaN in acc: once more, row by row, as in forward_kernel, but by pieces of columns, which go to memory
        again = tile < 0
        if WHICH != 2:
            again = again | any_nan(acc_k)
        if WHICH != 1:
            again = again | any_nan(acc_v)
        if again:
            PIECE: tl.constexpr = COLS if COLS < 64 else 64
            PIECE_V: tl.constexpr = COLS_V if COLS_V < 64 else 64
            hidden = never(nheads)
            b_k = k_batch + hidden
            k_at = k + (b_k.to(tl.int64) * k_b + head_k.to(tl.int64) * k_h) * UNIT
            v_at = v + (b_k.to(tl.int64) * v_b + head_k.to(tl.int64) * v_h) * UNIT
            j = n + hidden + tl.arange(0, KEYS)
            known = j < count
            careful = tl.minimum(end, seqlen_q) - start
            for c in range(0, tl.maximum(headdim, headdim_v), 64):
                if WHICH != 2:
                    part_k = tl.zeros((KEYS, PIECE), tl.float32)
                if WHICH != 1:
                    part_v = tl.zeros((KEYS, PIECE_V), tl.float32)
                for x in range(group * careful):  # row start + x % careful of head x // careful of the group
                    h = head_k * group + x // careful
                    m = start + x % careful
                    row = (q_first + m).to(tl.int64)
                    query = q + (q_batch.to(tl.int64) * q_b + row * q_r + h.to(tl.int64) * q_h) * UNIT
                    grad = dout + (q_batch.to(tl.int64) * do_b + row * do_r + h.to(tl.int64) * do_h) * UNIT
                    stats = (q_batch.to(tl.int64) * nheads + h) * rows_q + q_first
                    s = products(k_at, k_first, j, known, k_r, k_c, query, q_c, headdim, PIECE, UNIT)
                    dp = s
                    if WHICH != 2:
                        dp = products(v_at, k_first, j, known, v_r, v_c, grad, do_c, headdim_v, PIECE_V, UNIT)
                    i = m + tl.zeros((1, 1), tl.int32)
                    of_base = None
                    if base is not None:
                        of_base = tl.load(base + stats + m)
                    p, t = probabilities(
                        s, tl.load(lse2 + stats + m), of_base, i, j[:, None], i + count - seqlen_q, h, b,
                        seqlen_q, count, factor, scale, softcap,
                        alibi, alibi_b, alibi_h, bias, bias_b, bias_h, bias_r, bias_c, bias_rows, bias_keys,
                        PRECISION != "tf32",
                    )  # fmt: skip
                    visible = is_near(j[:, None], i + count - seqlen_q, left, right, chunk, MASK)
                    stays = None
                    if threshold is not None:
                        rows_here = m + tl.zeros((1,), tl.int32)
                        plane = rows_here * 0 + (b * nheads + h)
                        stays = tl.trans(kept(rows_here, n, plane, k0, k1, last, threshold, 1, KEYS).to(tl.int8)) != 0
                    p, du, ds = score_gradients(p, t, dp, tl.load(delta + stats + m), softcap, stays, drop_scale)
                    if WHICH != 1:
                        part_v += tl.where(visible, p * load_one(grad, c, do_c, headdim_v, PIECE_V), 0.0)
                    if WHICH != 2:
                        part_k += tl.where(visible, du * load_one(query, c, q_c, headdim, PIECE), 0.0)
                if WHICH != 2:
                    to_k = column(dk + (k_batch.to(tl.int64) * dk_b + head_k.to(tl.int64) * dk_h) * UNIT, c, dk_c)
                    store_tile(to_k, k_first + j, known, dk_r, dk_c, headdim - c, part_k * scale, PIECE, UNIT)
                if WHICH != 1:
                    to_v = column(dv + (k_batch.to(tl.int64) * dv_b + head_k.to(tl.int64) * dv_h) * UNIT, c, dv_c)
                    store_tile(to_v, k_first + j, known, dv_r, dv_c, headdim_v - c, part_v, PIECE_V, UNIT)
            return

    if WHICH != 2:
        to_k = dk + (k_batch.to(tl.int64) * dk_b + head_k.to(tl.int64) * dk_h) * UNIT
        store_tile(to_k, k_first + j, known, dk_r, dk_c, headdim, acc_k * scale, COLS, UNIT)
    if WHICH != 1:
        to_v = dv + (k_batch.to(tl.int64) * dv_b + head_k.to(tl.int64) * dv_h) * UNIT
        store_tile(to_v, k_first + j, known, dv_r, dv_c, headdim_v, acc_v, COLS_V, UNIT)


@triton.jit
def dq_kernel(
    q, k, v, out, dout, dq, lse2, delta, base, lse, dlse,
    cu_q, cu_k, used_q, used_k, leftpad, alibi, bias, state,
    q_b: "i64", q_r: "i64", q_h: "i64", k_b: "i64", k_r: "i64", k_h: "i64", v_b: "i64", v_r: "i64", v_h: "i64",
    o_b: "i64", o_r: "i64", o_h: "i64", do_b: "i64", do_r: "i64", do_h: "i64", dq_b: "i64", dq_r: "i64", dq_h: "i64",
    lse_b: "i64", lse_h: "i64", dlse_b: "i64", dlse_h: "i64", q_c, k_c, v_c, o_c, do_c, dq_c, lse_r, dlse_r,
    heads, nheads, group, tiles, block, rows_q, rows_k, seqlen_k, headdim, headdim_v, used, left, right, chunk,
    programs, slots, alibi_b, alibi_h, bias_b, bias_h, bias_r, bias_c, bias_rows, bias_keys, threshold,
    seed: "i64", offset: "i64", factor: "fp32", scale: "fp32", softcap, drop_scale,
    ROWS: tl.constexpr, KEYS: tl.constexpr, COLS: tl.constexpr, COLS_V: tl.constexpr, EVEN: tl.constexpr,
    UNIT: tl.constexpr, WIDE: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
    FIRST: tl.constexpr,
):  # fmt: skip
    """heads = batch * nheads; lse2, delta, and base, None without a bias: fp32 (batch_q, nheads, rows_q), written here;
    the rest as in dkdv_kernel.
    """
    headdim *= UNIT
    headdim_v *= UNIT
    pid = tl.program_id(0)
    if cu_q is not None:  # programs behind the others: rows of no sequence
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
    m = tile * ROWS
    if (tile < 0) | (m >= rows):
        return
    k_batch, k_first, count = key_rows(
        b, cu_k, used_k, leftpad, None, None, rows_k, 1, seqlen_k, used, None, None, None, False
    )
    i = m + tl.arange(0, ROWS)
    known = i < rows
    position = i + count - seqlen_q
    q_at = q + (q_batch.to(tl.int64) * q_b + h.to(tl.int64) * q_h) * UNIT
    o_at = out + (q_batch.to(tl.int64) * o_b + h.to(tl.int64) * o_h) * UNIT
    do_at = dout + (q_batch.to(tl.int64) * do_b + h.to(tl.int64) * do_h) * UNIT
    queries = load_rows(q_at, q_first, i, i < seqlen_q, q_r, q_c, headdim, COLS, EVEN, UNIT)
    grads = load_rows(do_at, q_first, i, i < seqlen_q, do_r, do_c, headdim_v, COLS_V, EVEN, UNIT)
    outs = load_rows(o_at, q_first, i, i < seqlen_q, o_r, o_c, headdim_v, COLS_V, EVEN, UNIT)
    row = (q_first + i).to(tl.int64)
    natural = tl.load(lse + q_batch.to(tl.int64) * lse_b + h.to(tl.int64) * lse_h + row * lse_r,
                      mask=i < seqlen_q, other=float("inf"))  # fmt: skip
    of_lse = tl.zeros((ROWS,), tl.float32)
    if dlse is not None:
        of_lse = tl.load(dlse + q_batch.to(tl.int64) * dlse_b + h.to(tl.int64) * dlse_h + row * dlse_r,
                         mask=i < seqlen_q, other=0.0)  # fmt: skip
    l2, d, of_row = row_statistics(outs, grads, natural, of_lse, base is not None)
    stats = (q_batch.to(tl.int64) * nheads + h) * rows_q + q_first
    tl.store(delta + stats + i, d, mask=known)

    k_at = k + (k_batch.to(tl.int64) * k_b + head_k.to(tl.int64) * k_h) * UNIT
    v_at = v + (k_batch.to(tl.int64) * v_b + head_k.to(tl.int64) * v_h) * UNIT
    start, full, stop, end = key_tiles(
        m, tl.minimum(m + ROWS, seqlen_q) - 1, seqlen_q, count, left, right, chunk, MASK, KEYS
    )
    if m >= seqlen_q:
        end = start
        full = start
        stop = start
    lo, hi = row_interval(position, count, left, right, chunk, MASK)
    plane = tl.zeros((ROWS,), tl.int32) + (b * nheads + h)
    k0, k1, last = 0, 0, 0
    if threshold is not None:
        k0, k1, last = seed_of(state, seed, offset)

    # of_row becomes a column at each use: Triton 3.6 fails on one that was made before the loop.
    if base is not None:
        if tl.max((of_row != 0).to(tl.int32), 0) > 0:
            total = tl.zeros((ROWS,), tl.float32)
            for n in range(start, end, KEYS):
                keys = load_tile(k_at, n, k_first, count, None, None, None, k_b, k_r, k_c, headdim,
                                 KEYS, COLS, EVEN, True, 0, UNIT, WIDE)  # fmt: skip
                j = n + tl.arange(0, KEYS)
                s = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
                p, t = probabilities(
                    s, l2[:, None], of_row[:, None], i[:, None], j[None, :], position[:, None], h, b,
                    seqlen_q, count, factor, scale, softcap,
                    alibi, alibi_b, alibi_h, bias, bias_b, bias_h, bias_r, bias_c, bias_rows, bias_keys,
                    PRECISION != "tf32",
                )  # fmt: skip
                total += tl.sum(tl.where((j[None, :] >= lo[:, None]) & (j[None, :] < hi[:, None]), p, 0.0), 1)
            l2 = with_sums(l2, of_row, total)
        tl.store(base + stats + i, of_row, mask=known)
    tl.store(lse2 + stats + i, l2, mask=known)

    acc = tl.zeros((ROWS, COLS), tl.float32)
    for EDGE in tl.static_range(FIRST, FIRST // 2 + 2):
        for index in tl.range(0, tile_count(start, full, stop, end, KEYS, EDGE)):
            n = tile_at(index, start, full, stop, KEYS, EDGE)
            keys = load_tile(k_at, n, k_first, count, None, None, None, k_b, k_r, k_c, headdim,
                             KEYS, COLS, EVEN, EDGE > 0, 0, UNIT, WIDE)  # fmt: skip
            values = load_tile(v_at, n, k_first, count, None, None, None, v_b, v_r, v_c, headdim_v,
                               KEYS, COLS_V, EVEN, EDGE > 0, 0, UNIT, WIDE)  # fmt: skip
            s = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
            dp = tl.dot(grads, tl.trans(values), input_precision=PRECISION)
            j = n + tl.arange(0, KEYS)
            p, t = probabilities(
                s, l2[:, None], of_row[:, None], i[:, None], j[None, :], position[:, None], h, b,
                seqlen_q, count, factor, scale, softcap,
                alibi, alibi_b, alibi_h, bias, bias_b, bias_h, bias_r, bias_c, bias_rows, bias_keys,
                PRECISION != "tf32",
            )  # fmt: skip
            if EDGE == 1:
                p = tl.where((j[None, :] >= lo[:, None]) & (j[None, :] < hi[:, None]), p, 0.0)
            elif EDGE == 2:
                if (n < full) | (n >= stop):
                    p = tl.where((j[None, :] >= lo[:, None]) & (j[None, :] < hi[:, None]), p, 0.0)
            stays = None
            if threshold is not None:
                stays = kept(i, n, plane, k0, k1, last, threshold, ROWS, KEYS)
            p, du, ds = score_gradients(p, t, dp, d[:, None], softcap, stays, drop_scale)
            acc = tl.dot(du.to(keys.dtype), keys, acc, input_precision=PRECISION)

    if MASK > 0:  # a NaN in acc: once more, key by key, as in dkdv_kernel
        if any_nan(acc):
            PIECE: tl.constexpr = COLS if COLS < 64 else 64
            PIECE_V: tl.constexpr = COLS_V if COLS_V < 64 else 64
            hidden = never(nheads)
            i = m + hidden + tl.arange(0, ROWS)
            valid = i < seqlen_q
            b_q = q_batch + hidden
            q_at = q + (b_q.to(tl.int64) * q_b + h.to(tl.int64) * q_h) * UNIT
            do_at = dout + (b_q.to(tl.int64) * do_b + h.to(tl.int64) * do_h) * UNIT
            known = i < rows
            for c in range(0, headdim, PIECE):
                part = tl.zeros((ROWS, PIECE), tl.float32)
                for n in range(start, tl.minimum(end, count)):
                    key = k_at + (k_first + n).to(tl.int64) * k_r * UNIT
                    value = v_at + (k_first + n).to(tl.int64) * v_r * UNIT
                    s = products(q_at, q_first, i, valid, q_r, q_c, key, k_c, headdim, PIECE, UNIT)
                    dp = products(do_at, q_first, i, valid, do_r, do_c, value, v_c, headdim_v, PIECE_V, UNIT)
                    j = n + tl.zeros((1, 1), tl.int32)
                    p, t = probabilities(
                        s, l2[:, None], of_row[:, None], i[:, None], j, position[:, None], h, b,
                        seqlen_q, count, factor, scale, softcap,
                        alibi, alibi_b, alibi_h, bias, bias_b, bias_h, bias_r, bias_c, bias_rows, bias_keys,
                        PRECISION != "tf32",
                    )  # fmt: skip
                    visible = (j >= lo[:, None]) & (j < hi[:, None])
                    stays = None
                    if threshold is not None:
                        stays = kept_one(i, n, plane, k0, k1, last, threshold, ROWS)
                    p, du, ds = score_gradients(p, t, dp, d[:, None], softcap, stays, drop_scale)
                    part += tl.where(visible, du * load_one(key, c, k_c, headdim, PIECE), 0.0)
                to = column(dq + (q_batch.to(tl.int64) * dq_b + h.to(tl.int64) * dq_h) * UNIT, c, dq_c)
                store_tile(to, q_first + i, known, dq_r, dq_c, headdim - c, part * scale, PIECE, UNIT)
            return
    to = dq + (q_batch.to(tl.int64) * dq_b + h.to(tl.int64) * dq_h) * UNIT
    store_tile(to, q_first + i, known, dq_r, dq_c, headdim, acc * scale, COLS, UNIT)
