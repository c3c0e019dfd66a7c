"""What the backward kernels share: the probabilities and the gradient of the scores of one tile.

    P = exp2(raw * factor - lse2),  dP = Z (dout . v),  dS = P (dP - delta),  dU = dS (1 - tanh^2)

lse2 and delta come from delta_kernel: lse in base 2, +inf for a row that sees nothing (P = 0), and dout . out - dlse.
"""

import triton
import triton.language as tl

from .dropout import kept
from .mask import is_visible
from .scores import natural_scores


@triton.jit
def delta_kernel(
    out, dout, lse, dlse, lse2, delta,
    o_b: "i64", o_r: "i64", o_h: "i64", do_b: "i64", do_r: "i64", do_h: "i64", lse_b: "i64", lse_h: "i64",
    dlse_b: "i64", dlse_h: "i64", o_c, do_c, lse_r, dlse_r,
    tiles, nheads, rows_q, headdim_v, ROWS: tl.constexpr, COLS_V: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """out, dout (batch, row, head, col) -> lse2, delta, fp32 (batch, head, row), whatever the sequences."""
    pid = tl.program_id(0)
    h = pid % nheads
    tile = pid // nheads % tiles
    b = (pid // nheads // tiles).to(tl.int64)
    row = tile * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, COLS_V)
    known = row < rows_q
    mask = known[:, None] & (cols < headdim_v * UNIT)[None, :]
    from_out = out + (b * o_b + h * o_h) * UNIT + (row.to(tl.int64) * o_r * UNIT)[:, None]
    from_dout = dout + (b * do_b + h * do_h) * UNIT + (row.to(tl.int64) * do_r * UNIT)[:, None]
    if o_c is None:
        from_out += cols[None, :]
    else:
        from_out += cols.to(tl.int64)[None, :] * o_c
    if do_c is None:
        from_dout += cols[None, :]
    else:
        from_dout += cols.to(tl.int64)[None, :] * do_c
    x = tl.load(from_out, mask=mask, other=0.0).to(tl.float32)
    y = tl.load(from_dout, mask=mask, other=0.0).to(tl.float32)
    d = tl.sum(x * y, 1)
    if dlse is not None:
        d -= tl.load(dlse + b * dlse_b + h * dlse_h + row.to(tl.int64) * dlse_r, mask=known, other=0.0)
    natural = tl.load(lse + b * lse_b + h * lse_h + row.to(tl.int64) * lse_r, mask=known, other=float("inf"))
    l2 = natural * 1.4426950408889634
    # Probabilities are at most 1. Where scores are so large that a rounding of them is a factor of 2 and more, lse goes
    # up by a few roundings, so that none overflows.
    l2 = tl.where(tl.abs(l2) >= 4194304.0, l2 + tl.abs(l2) * 2.384185791015625e-07, l2)
    l2 = tl.where(tl.abs(natural) == float("inf"), float("inf"), l2)
    at = (b * nheads + h) * rows_q + row
    tl.store(lse2 + at, l2, mask=known)
    tl.store(delta + at, d, mask=known)


@triton.jit
def score_gradients(
    dots, dots_v, l2, d, i, j, n, m, position, h, b, nheads, seqlen_q, seqlen_k, factor, scale, softcap,
    left, right, chunk, alibi, alibi_b, alibi_h, bias, bias_b, bias_h, bias_r, bias_c, bias_rows, bias_keys,
    k0, k1, last, threshold, drop_scale, MASK: tl.constexpr, HIDE: tl.constexpr, TRANSPOSED: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """dots = q.k and dots_v = dout.v of rows m + [0, ROWS) and keys n + [0, KEYS), or transposed.

    -> Z P, dU, dS and what is visible. l2, d, i, position broadcast along keys, j along rows. HIDE: whether some
    entries are masked.
    """
    PLAIN: tl.constexpr = softcap is None and alibi is None and bias is None
    raw = dots
    if not PLAIN:
        raw, t = natural_scores(
            dots, i, j, position, h, b, seqlen_q, seqlen_k, scale, softcap, alibi, alibi_b, alibi_h,
            bias, bias_b, bias_h, bias_r, bias_c, bias_rows, bias_keys, EXACT,
        )  # fmt: skip
    p = tl.exp2(tl.fma(raw, factor, -l2))
    visible = is_visible(j, position, seqlen_k, left, right, chunk, MASK)
    if HIDE:
        p = tl.where(visible, p, 0.0)
    dp = dots_v
    weights = p
    if threshold is not None:
        rows = m + tl.arange(0, ROWS)
        stays = kept(rows, n, rows * 0 + (b * nheads + h), k0, k1, last, threshold, ROWS, KEYS)
        if TRANSPOSED:
            stays = tl.trans(stays.to(tl.int8)) != 0
        weights = tl.where(stays, p * drop_scale, 0.0)
        dp = tl.where(stays, dp * drop_scale, 0.0)
    ds = p * (dp - d)
    if HIDE:
        ds = tl.where(visible, ds, 0.0)
    du = ds
    if softcap is not None:
        du = ds * (1.0 - t * t)
    return weights, du, ds, visible
