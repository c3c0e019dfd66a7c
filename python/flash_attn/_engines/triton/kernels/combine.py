"""Joins the parts of a row's keys: out = sum_s w_s out_s, w_s = exp(lse_s - lse), lse = log sum_s exp(lse_s).

Rows are those of q's memory, whatever their sequence: row `at` of (batch_q, rows_q, nheads). It reads parts x headdim_v
fp32 numbers per row, once.
"""

import triton
import triton.language as tl

from .scores import LOG2E


@triton.jit
def combine_kernel(
    out_parts, lse_parts, out, lse, sink,
    o_b: "i64", o_r: "i64", o_h: "i64", lse_b: "i64", lse_h: "i64", o_c, lse_r,
    memory, rows_q, nheads, headdim_v, splits, sink_h, empty_lse: "fp32",
    ROWS: tl.constexpr, COLS_V: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """out_parts (splits, memory, headdim_v), lse_parts (splits, memory), memory = batch_q * rows_q * nheads.

    A part of -inf saw nothing; +inf: the row belongs to no sequence, and has no sink either.
    """
    at = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, COLS_V)
    known = at < memory
    h = at % nheads
    row = at // nheads
    batch = row // rows_q
    row = row % rows_q

    parts = tl.arange(0, PARTS)
    lses = tl.load(lse_parts + parts.to(tl.int64)[None, :] * memory + at[:, None],
                   mask=known[:, None] & (parts < splits)[None, :], other=float("-inf"))  # fmt: skip
    absent = tl.max((lses == float("inf")).to(tl.int32), 1) > 0
    lses = tl.where(absent[:, None], float("-inf"), lses)
    top = tl.max(lses, 1)
    if sink is not None:
        logit = tl.load(sink + h * sink_h, mask=known, other=0.0).to(tl.float32)
        logit = tl.where(absent, float("-inf"), logit)
        top = tl.maximum(top, logit)
    top_or_0 = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(tl.exp2((lses - top_or_0[:, None]) * LOG2E), 1)
    if sink is not None:
        total += tl.exp2((logit - top_or_0) * LOG2E)
    seen = total != 0
    acc = tl.zeros((ROWS, COLS_V), tl.float32)
    for s in range(splits):
        part = tl.load(lse_parts + (at * 0 + memory) * s + at, mask=known, other=float("-inf"))
        weight = tl.exp2((part - top_or_0) * LOG2E) / tl.where(seen, total, 1.0)
        saw = known & (part != float("-inf")) & ~absent
        where = out_parts + (((at * 0 + memory) * s + at) * headdim_v)[:, None] + cols[None, :]
        x = tl.load(where, mask=saw[:, None] & (cols < headdim_v)[None, :], other=0.0)
        acc += tl.where(saw[:, None], x * weight[:, None], 0.0)
    to = out + (batch * o_b + row * o_r + h * o_h)[:, None]
    if o_c is None:
        to += cols[None, :]
    else:
        to += cols.to(tl.int64)[None, :] * o_c
    tl.store(to, acc.to(out.dtype.element_ty), mask=known[:, None] & (cols < headdim_v)[None, :])
    if lse is not None:
        to_lse = lse + batch * lse_b + h * lse_h + row * lse_r
        tl.store(to_lse, tl.where(seen, top + tl.log(tl.where(seen, total, 1.0)), empty_lse), mask=known)
