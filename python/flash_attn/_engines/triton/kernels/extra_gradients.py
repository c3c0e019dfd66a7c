"""Gradients of what is added to scores: the bias, and the sink.

dbias = dS, summed over all that the bias is broadcast to. A program owns a tile of dbias, computes dS afresh for every
sequence, head and row that the tile serves, and writes once: one mechanism for every shape, in an order of its own.
"""

import triton
import triton.language as tl

from .dropout import kept, seed_of
from .gradients import probabilities, score_gradients
from .mask import row_interval
from .sequences import key_rows, load_tile, query_rows


@triton.jit
def dbias_kernel(
    q, k, v, dout, dbias, lse2, delta, base,
    cu_q, cu_k, used_q, used_k, leftpad, alibi, bias, state,
    q_b: "i64", q_r: "i64", q_h: "i64", k_b: "i64", k_r: "i64", k_h: "i64", v_b: "i64", v_r: "i64", v_h: "i64",
    do_b: "i64", do_r: "i64", do_h: "i64", db_b: "i64", db_h: "i64", db_r: "i64", db_c: "i64", q_c, k_c, v_c, do_c,
    batch, nheads, group, tiles_r, tiles_c, shape_b, shape_h, shape_r, shape_c, rows_q, rows_k, seqlen_k,
    headdim, headdim_v, used, left, right, chunk,
    alibi_b, alibi_h, bias_b, bias_h, bias_r, bias_c, bias_rows, bias_keys, threshold, seed: "i64", offset: "i64",
    factor: "fp32", scale: "fp32", softcap, drop_scale,
    ROWS: tl.constexpr, KEYS: tl.constexpr, COLS: tl.constexpr, COLS_V: tl.constexpr, EVEN: tl.constexpr,
    UNIT: tl.constexpr, WIDE: tl.constexpr, MASK: tl.constexpr, ROWS_ALIKE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dbias (shape_b, shape_h, shape_r, shape_c); ROWS_ALIKE: shape_r = 1 is a broadcast dimension."""
    headdim *= UNIT
    headdim_v *= UNIT
    pid = tl.program_id(0)
    tile_c = pid % tiles_c
    tile_r = pid // tiles_c % tiles_r
    bias_head = pid // tiles_c // tiles_r % shape_h
    bias_batch = pid // tiles_c // tiles_r // shape_h
    n = tile_c * KEYS
    j = n + tl.arange(0, KEYS)
    k0, k1, last = 0, 0, 0
    if threshold is not None:
        k0, k1, last = seed_of(state, seed, offset)
    acc = tl.zeros((ROWS, KEYS), tl.float32)
    for x in range(batch // shape_b):
        b = bias_batch + x
        q_batch, q_first, rows, seqlen_q = query_rows(b, cu_q, used_q, rows_q)
        k_batch, k_first, count = key_rows(
            b, cu_k, used_k, leftpad, None, None, rows_k, 1, seqlen_k, used, None, None, None, False
        )
        first = tile_r * ROWS
        last_row = tl.minimum(first + ROWS, seqlen_q)
        if ROWS_ALIKE:
            first = first * 0
            last_row = seqlen_q
        if n < count:
            for y in range(nheads // shape_h):
                h = bias_head + y
                head_k = h // group
                q_at = q + (q_batch.to(tl.int64) * q_b + h.to(tl.int64) * q_h) * UNIT
                do_at = dout + (q_batch.to(tl.int64) * do_b + h.to(tl.int64) * do_h) * UNIT
                k_at = k + (k_batch.to(tl.int64) * k_b + head_k.to(tl.int64) * k_h) * UNIT
                v_at = v + (k_batch.to(tl.int64) * v_b + head_k.to(tl.int64) * v_h) * UNIT
                stats = (q_batch.to(tl.int64) * nheads + h) * rows_q + q_first
                keys = load_tile(k_at, n, k_first, count, None, None, None, k_b, k_r, k_c, headdim,
                                 KEYS, COLS, EVEN, True, 0, UNIT, WIDE)  # fmt: skip
                values = load_tile(v_at, n, k_first, count, None, None, None, v_b, v_r, v_c, headdim_v,
                                   KEYS, COLS_V, EVEN, True, 0, UNIT, WIDE)  # fmt: skip
                for m in range(first, last_row, ROWS):
                    i = m + tl.arange(0, ROWS)
                    position = i + count - seqlen_q
                    queries = load_tile(q_at, q_first * 0 + m, q_first, seqlen_q, None, None, None, q_b, q_r, q_c,
                                        headdim, ROWS, COLS, EVEN, True, 0, UNIT, WIDE)  # fmt: skip
                    grads = load_tile(do_at, q_first * 0 + m, q_first, seqlen_q, None, None, None, do_b, do_r, do_c,
                                      headdim_v, ROWS, COLS_V, EVEN, True, 0, UNIT, WIDE)  # fmt: skip
                    l2 = tl.load(lse2 + stats + i, mask=i < seqlen_q, other=float("inf"))
                    d = tl.load(delta + stats + i, mask=i < seqlen_q, other=0.0)
                    of_base = tl.load(base + stats + i, mask=i < seqlen_q, other=0.0)[:, None]
                    s = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
                    dp = tl.dot(grads, tl.trans(values), input_precision=PRECISION)
                    p, t = probabilities(
                        s, l2[:, None], of_base, i[:, None], j[None, :], position[:, None], h, b,
                        seqlen_q, count, factor, scale, softcap,
                        alibi, alibi_b, alibi_h, bias, bias_b, bias_h, bias_r, bias_c, bias_rows, bias_keys,
                        PRECISION != "tf32",
                    )  # fmt: skip
                    lo, hi = row_interval(position, count, left, right, chunk, MASK)
                    visible = (j[None, :] >= lo[:, None]) & (j[None, :] < hi[:, None])
                    p = tl.where(visible, p, 0.0)
                    stays = None
                    if threshold is not None:
                        stays = kept(i, n, i * 0 + (b * nheads + h), k0, k1, last, threshold, ROWS, KEYS)
                    p, du, ds = score_gradients(p, t, dp, d[:, None], softcap, stays, drop_scale)
                    acc += tl.where(visible, ds, 0.0)
    to = dbias + bias_batch.to(tl.int64) * db_b + bias_head.to(tl.int64) * db_h + j.to(tl.int64)[None, :] * db_c
    if ROWS_ALIKE:
        tl.store(to, tl.sum(acc, 0)[None, :], mask=(j < shape_c)[None, :])
    else:
        i = tile_r * ROWS + tl.arange(0, ROWS)
        to += i.to(tl.int64)[:, None] * db_r
        tl.store(to, acc, mask=(i < shape_r)[:, None] & (j < shape_c)[None, :])


@triton.jit
def dsink_kernel(sink, dsink, lse2, delta, base, batch, nheads, rows_q, sink_h, dsink_h, ROWS: tl.constexpr):
    """dsink (nheads) = sum over all rows of P_sink (dlse - dout.out); a program per head, one order.

    Rows of no sequence and rows that see nothing have lse2 = +inf: P_sink = 0.
    """
    h = tl.program_id(0)
    logit = tl.load(sink + h * sink_h).to(tl.float32)
    acc = tl.zeros((ROWS,), tl.float32)
    for b in range(batch):
        at = (h.to(tl.int64) + nheads * b) * rows_q
        for m in range(0, rows_q, ROWS):
            i = m + tl.arange(0, ROWS)
            l2 = tl.load(lse2 + at + i, mask=i < rows_q, other=float("inf"))
            d = tl.load(delta + at + i, mask=i < rows_q, other=0.0)
            raw = logit
            if base is not None:
                raw = logit - tl.load(base + at + i, mask=i < rows_q, other=0.0)
            acc -= tl.where(l2 == float("inf"), 0.0, tl.exp2(raw * 1.4426950408889634 - l2) * d)
    tl.store(dsink + h * dsink_h, tl.sum(acc, 0))
