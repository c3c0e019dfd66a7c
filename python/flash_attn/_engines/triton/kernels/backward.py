"""dq, and dk with dv, by two kernels: seven products in all, no atomics, the same bits at every run.

Counted per tile of 64 x 64 at headdim 128: a fused kernel would do five products instead of seven, and add 32 KB of
dq in fp32 to memory for each tile; that is 6 bytes per kFLOP more than tensor cores can wait for.
dkdv_kernel owns KEYS keys of one key head and passes over the rows that see them, of all query heads of the group. Its
scores are transposed, (keys, rows), so that P and dS come out of one product in the shape that the next one takes from
registers. dq_kernel owns ROWS rows and passes over keys, as the forward does.
"""

import triton
import triton.language as tl

from .dropout import seed_of
from .forward import any_nan, weigh
from .gradients import score_gradients
from .mask import key_tiles, row_tiles, tile_at, tile_count
from .sequences import clear_rows, is_outside, key_rows, load_tile, query_rows, tile_and_head


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
def dkdv_kernel(
    q, k, v, dout, dk, dv, lse2, delta,
    cu_q, cu_k, used_q, used_k, leftpad, alibi, bias, state,
    q_b: "i64", q_r: "i64", q_h: "i64", k_b: "i64", k_r: "i64", k_h: "i64", v_b: "i64", v_r: "i64", v_h: "i64",
    do_b: "i64", do_r: "i64", do_h: "i64", dk_b: "i64", dk_r: "i64", dk_h: "i64", dv_b: "i64", dv_r: "i64", dv_h: "i64",
    q_c, k_c, v_c, do_c, dk_c, dv_c,
    heads, nheads, group, tiles, block, rows_q, rows_k, seqlen_k, headdim, headdim_v, used, left, right, chunk, programs,
    alibi_b, alibi_h, bias_b, bias_h, bias_r, bias_c, bias_rows, bias_keys, threshold, seed: "i64", offset: "i64",
    factor: "fp32", scale: "fp32", softcap, drop_scale,
    ROWS: tl.constexpr, KEYS: tl.constexpr, COLS: tl.constexpr, COLS_V: tl.constexpr, EVEN: tl.constexpr,
    UNIT: tl.constexpr, WIDE: tl.constexpr, MASK: tl.constexpr, GUARD: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """heads = batch * nheads_k; factor, scale of q.k: of raw scores in base 2, and the softmax scale."""
    headdim *= UNIT
    headdim_v *= UNIT
    nheads_k = nheads // group
    pid = tl.program_id(0)
    if cu_k is not None:  # programs behind the others: keys of no sequence, KEYS of them for all heads
        if pid >= programs:
            row = (pid - programs) * KEYS + tl.arange(0, KEYS)
            outside = is_outside(cu_k, heads // nheads_k, row, rows_k)
            if tl.max(outside.to(tl.int32), 0) > 0:
                clear_rows(dk, row, outside, nheads_k, dk_r * UNIT, dk_h * UNIT, dk_c, headdim, KEYS, COLS)
                clear_rows(dv, row, outside, nheads_k, dv_r * UNIT, dv_h * UNIT, dv_c, headdim_v, KEYS, COLS_V)
            return
    tile, head = tile_and_head(pid, tiles, block, heads, False)
    b = head // nheads_k
    head_k = head % nheads_k
    k_batch, k_first, count = key_rows(
        b, cu_k, used_k, leftpad, None, None, rows_k, 1, seqlen_k, used, None, None, None, False
    )
    n = tile * KEYS
    if n >= count:
        return
    q_batch, q_first, rows, seqlen_q = query_rows(b, cu_q, used_q, rows_q)

    k_at = k + (k_batch.to(tl.int64) * k_b + head_k.to(tl.int64) * k_h) * UNIT
    v_at = v + (k_batch.to(tl.int64) * v_b + head_k.to(tl.int64) * v_h) * UNIT
    keys = load_tile(k_at, n, k_first, count, None, None, None, k_b, k_r, k_c, headdim,
                     KEYS, COLS, EVEN, True, 0, UNIT, WIDE)  # fmt: skip
    values = load_tile(v_at, n, k_first, count, None, None, None, v_b, v_r, v_c, headdim_v,
                       KEYS, COLS_V, EVEN, True, 0, UNIT, WIDE)  # fmt: skip
    start, full, stop, end = row_tiles(
        n, tl.minimum(n + KEYS, count) - 1, seqlen_q, count, left, right, chunk, MASK, ROWS
    )
    j = n + tl.arange(0, KEYS)
    k0, k1, last = 0, 0, 0
    if threshold is not None:
        k0, k1, last = seed_of(state, seed, offset)

    acc_k = tl.zeros((KEYS, COLS), tl.float32)
    acc_v = tl.zeros((KEYS, COLS_V), tl.float32)
    heads_q = group
    for PASS in tl.static_range(1 + GUARD):  # the second: see forward_kernel
        if PASS == 1:
            again = any_nan(acc_k) | any_nan(acc_v)
            acc_k = tl.where(again, 0.0, acc_k)
            acc_v = tl.where(again, 0.0, acc_v)
            heads_q = tl.where(again, group, 0)
            full = start
            stop = start
        for g in range(0, heads_q):
            h = head_k * group + g
            q_at = q + (q_batch.to(tl.int64) * q_b + h.to(tl.int64) * q_h) * UNIT
            do_at = dout + (q_batch.to(tl.int64) * do_b + h.to(tl.int64) * do_h) * UNIT
            stats = (q_batch.to(tl.int64) * nheads + h) * rows_q + q_first
            for EDGE in tl.static_range(PASS, 2):
                for index in tl.range(0, tile_count(start, full, stop, end, ROWS, EDGE), num_stages=1 if PASS == 1 else STAGES):
                    m = tile_at(index, start, full, stop, ROWS, EDGE)
                    i = m + tl.arange(0, ROWS)
                    queries = load_tile(q_at, m, q_first, seqlen_q, None, None, None, q_b, q_r, q_c, headdim,
                                        ROWS, COLS, EVEN, EDGE, 0, UNIT, WIDE)  # fmt: skip
                    if EDGE:
                        l2 = tl.load(lse2 + stats + i, mask=i < seqlen_q, other=float("inf"))
                        d = tl.load(delta + stats + i, mask=i < seqlen_q, other=0.0)
                    else:
                        l2 = tl.load(lse2 + stats + i)
                        d = tl.load(delta + stats + i)
                    s = tl.dot(keys, tl.trans(queries), input_precision=PRECISION)
                    grads = load_tile(do_at, m, q_first, seqlen_q, None, None, None, do_b, do_r, do_c, headdim_v,
                                      ROWS, COLS_V, EVEN, EDGE, 0, UNIT, WIDE)  # fmt: skip
                    dp = tl.dot(values, tl.trans(grads), input_precision=PRECISION)
                    position = i + count - seqlen_q
                    p, du, ds, visible = score_gradients(
                        s, dp, l2[None, :], d[None, :], i[None, :], j[:, None], n, m,
                        position[None, :], h, b, nheads, seqlen_q, count, factor, scale, softcap, left, right, chunk,
                        alibi, alibi_b, alibi_h,
                        bias, bias_b, bias_h, bias_r, bias_c, bias_rows, bias_keys, k0, k1, last, threshold, drop_scale,
                        MASK, EDGE and MASK > 0, True, ROWS, KEYS, PRECISION == "ieee",
                    )  # fmt: skip
                    acc_v = weigh(p, grads, visible, acc_v, PASS == 1, PRECISION)
                    acc_k = weigh(du, queries, visible, acc_k, PASS == 1, PRECISION)
    to_k = dk + (k_batch.to(tl.int64) * dk_b + head_k.to(tl.int64) * dk_h) * UNIT
    to_v = dv + (k_batch.to(tl.int64) * dv_b + head_k.to(tl.int64) * dv_h) * UNIT
    store_tile(to_k, k_first + j, j < count, dk_r, dk_c, headdim, acc_k * scale, COLS, UNIT)
    store_tile(to_v, k_first + j, j < count, dv_r, dv_c, headdim_v, acc_v, COLS_V, UNIT)


@triton.jit
def dq_kernel(
    q, k, v, dout, dq, lse2, delta,
    cu_q, cu_k, used_q, used_k, leftpad, alibi, bias, state,
    q_b: "i64", q_r: "i64", q_h: "i64", k_b: "i64", k_r: "i64", k_h: "i64", v_b: "i64", v_r: "i64", v_h: "i64",
    do_b: "i64", do_r: "i64", do_h: "i64", dq_b: "i64", dq_r: "i64", dq_h: "i64", q_c, k_c, v_c, do_c, dq_c,
    heads, nheads, group, tiles, block, rows_q, rows_k, seqlen_k, headdim, headdim_v, used, left, right, chunk, programs,
    alibi_b, alibi_h, bias_b, bias_h, bias_r, bias_c, bias_rows, bias_keys, threshold, seed: "i64", offset: "i64",
    factor: "fp32", scale: "fp32", softcap, drop_scale,
    ROWS: tl.constexpr, KEYS: tl.constexpr, COLS: tl.constexpr, COLS_V: tl.constexpr, EVEN: tl.constexpr,
    UNIT: tl.constexpr, WIDE: tl.constexpr, MASK: tl.constexpr, GUARD: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """heads = batch * nheads; the rest as in dkdv_kernel."""
    headdim *= UNIT
    headdim_v *= UNIT
    pid = tl.program_id(0)
    if cu_q is not None:  # programs behind the others: rows of no sequence
        if pid >= programs:
            row = (pid - programs) * ROWS + tl.arange(0, ROWS)
            outside = is_outside(cu_q, heads // nheads, row, rows_q)
            if tl.max(outside.to(tl.int32), 0) > 0:
                clear_rows(dq, row, outside, nheads, dq_r * UNIT, dq_h * UNIT, dq_c, headdim, ROWS, COLS)
            return
    tile, head = tile_and_head(pid, tiles, block, heads, True)
    b = head // nheads
    h = head % nheads
    head_k = h // group
    q_batch, q_first, rows, seqlen_q = query_rows(b, cu_q, used_q, rows_q)
    m = tile * ROWS
    if m >= rows:
        return
    k_batch, k_first, count = key_rows(
        b, cu_k, used_k, leftpad, None, None, rows_k, 1, seqlen_k, used, None, None, None, False
    )
    i = m + tl.arange(0, ROWS)
    position = i + count - seqlen_q
    q_at = q + (q_batch.to(tl.int64) * q_b + h.to(tl.int64) * q_h) * UNIT
    do_at = dout + (q_batch.to(tl.int64) * do_b + h.to(tl.int64) * do_h) * UNIT
    queries = load_tile(q_at, m, q_first, seqlen_q, None, None, None, q_b, q_r, q_c, headdim,
                        ROWS, COLS, EVEN, True, 0, UNIT, WIDE)  # fmt: skip
    grads = load_tile(do_at, m, q_first, seqlen_q, None, None, None, do_b, do_r, do_c, headdim_v,
                      ROWS, COLS_V, EVEN, True, 0, UNIT, WIDE)  # fmt: skip
    stats = (q_batch.to(tl.int64) * nheads + h) * rows_q + q_first
    l2 = tl.load(lse2 + stats + i, mask=i < seqlen_q, other=float("inf"))
    d = tl.load(delta + stats + i, mask=i < seqlen_q, other=0.0)
    k_at = k + (k_batch.to(tl.int64) * k_b + head_k.to(tl.int64) * k_h) * UNIT
    v_at = v + (k_batch.to(tl.int64) * v_b + head_k.to(tl.int64) * v_h) * UNIT
    start, full, stop, end = key_tiles(
        m, tl.minimum(m + ROWS, seqlen_q) - 1, seqlen_q, count, left, right, chunk, MASK, KEYS
    )
    if m >= seqlen_q:
        end = start
        full = start
        stop = start
    k0, k1, last = 0, 0, 0
    if threshold is not None:
        k0, k1, last = seed_of(state, seed, offset)

    acc = tl.zeros((ROWS, COLS), tl.float32)
    for PASS in tl.static_range(1 + GUARD):
        if PASS == 1:
            again = any_nan(acc)
            acc = tl.where(again, 0.0, acc)
            end = tl.where(again, end, start)
            full = start
            stop = start
        for EDGE in tl.static_range(PASS, 2):
            for index in tl.range(0, tile_count(start, full, stop, end, KEYS, EDGE), num_stages=1 if PASS == 1 else STAGES):
                n = tile_at(index, start, full, stop, KEYS, EDGE)
                keys = load_tile(k_at, n, k_first, count, None, None, None, k_b, k_r, k_c, headdim,
                                 KEYS, COLS, EVEN, EDGE, 0, UNIT, WIDE)  # fmt: skip
                values = load_tile(v_at, n, k_first, count, None, None, None, v_b, v_r, v_c, headdim_v,
                                   KEYS, COLS_V, EVEN, EDGE, 0, UNIT, WIDE)  # fmt: skip
                s = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
                dp = tl.dot(grads, tl.trans(values), input_precision=PRECISION)
                j = n + tl.arange(0, KEYS)
                p, du, ds, visible = score_gradients(
                    s, dp, l2[:, None], d[:, None], i[:, None], j[None, :], n, m,
                    position[:, None], h, b, nheads, seqlen_q, count, factor, scale, softcap, left, right, chunk,
                        alibi, alibi_b, alibi_h,
                    bias, bias_b, bias_h, bias_r, bias_c, bias_rows, bias_keys, k0, k1, last, threshold, drop_scale,
                    MASK, EDGE, False, ROWS, KEYS, PRECISION == "ieee",
                )  # fmt: skip
                acc = weigh(du, keys, visible, acc, PASS == 1, PRECISION)
    to = dq + (q_batch.to(tl.int64) * dq_b + h.to(tl.int64) * dq_h) * UNIT
    store_tile(to, q_first + i, i < rows, dq_r, dq_c, headdim, acc * scale, COLS, UNIT)
