"""Joins the parts of a row's keys: out = sum_s w_s out_s, w_s = exp(lse_s - lse), lse = log sum_s exp(lse_s).

Where a bias may hide a whole row by a huge finite number, lse_s is that number, and the count of keys in it is lost:
then lse_parts are the largest scores, and sums_parts the sums that go with them.

Rows are those of q's memory, whatever their sequence: row `at` of (batch_q, rows_q, nheads). It reads parts x headdim_v
fp32 numbers per row, once, all at once: a program per row waits for memory once.
"""

import triton
import triton.language as tl

from .scores import LOG2E


@triton.jit
def combine_kernel(
    out_parts, lse_parts, sums_parts, out, lse, sink,
    o_b: "i64", o_r: "i64", o_h: "i64", lse_b: "i64", lse_h: "i64", o_c, lse_r,
    memory, rows_q, nheads, headdim_v, splits, sink_h, empty_lse: "fp32",
    COLS_V: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """out_parts (splits, memory, headdim_v), lse_parts, sums_parts (splits, memory); memory = batch_q rows_q nheads.

    A part of -inf saw nothing; +inf: the row belongs to no sequence, and has no sink either.
    """
    at = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, COLS_V)
    parts = tl.arange(0, PARTS)
    h = (at % nheads).to(tl.int32)
    row = at // nheads
    batch = row // rows_q
    row = row % rows_q

    lses = tl.load(lse_parts + parts.to(tl.int64) * memory + at, mask=parts < splits, other=float("-inf"))
    absent = tl.max((lses == float("inf")).to(tl.int32), 0) > 0
    lses = tl.where(absent, float("-inf"), lses)
    top = tl.max(lses, 0)
    if sink is not None:
        logit = tl.where(absent, float("-inf"), tl.load(sink + h * sink_h).to(tl.float32))
        top = tl.maximum(top, logit)
    top_or_0 = tl.where(top == float("-inf"), 0.0, top)
    weights = tl.exp2((lses - top_or_0) * LOG2E)
    if sums_parts is not None:
        sums = tl.load(sums_parts + parts.to(tl.int64) * memory + at, mask=parts < splits, other=0.0)
        weights = tl.where(lses == float("-inf"), 0.0, weights * sums)
    total = tl.sum(weights, 0)
    if sink is not None:
        total += tl.exp2((logit - top_or_0) * LOG2E)
    seen = total != 0
    saw = lses != float("-inf")
    where = out_parts + ((parts.to(tl.int64) * memory + at) * headdim_v)[:, None] + cols[None, :]
    x = tl.load(where, mask=saw[:, None] & (cols < headdim_v)[None, :], other=0.0)
    acc = tl.sum(tl.where(saw[:, None], x * weights[:, None], 0.0), 0) / tl.where(seen, total, 1.0)
    to = out + batch * o_b + row * o_r + h * o_h
    if o_c is None:
        to += cols
    else:
        to += cols.to(tl.int64) * o_c
    tl.store(to, acc.to(out.dtype.element_ty), mask=cols < headdim_v)
    if lse is not None:
        to_lse = lse + batch * lse_b + h * lse_h + row * lse_r
        tl.store(to_lse, tl.where(seen, top + tl.log(tl.where(seen, total, 1.0)), empty_lse))
