"""What the backward kernels share: the probabilities and the gradient of the scores of one tile.

    P = exp2(raw * factor - lse2),  dP = Z (dout . v),  dS = P (dP - delta),  dU = dS (1 - tanh^2)

lse2 is lse in base 2, +inf for a row that sees nothing (P = 0); delta is dout . out - dlse. dq_kernel computes both, of
the rows it owns, and leaves them in memory for the others.

A bias, or a function of scores, may hide a whole row by a number that is huge but finite: -1e30, or the least of the
dtype. Then lse is that number, and how many keys share it was lost when lse was rounded. Of such a row (only where
something of the kind may happen) `base` is lse, 0 of others; scores count from it, and lse2 is log2 of their sum, which
dq_kernel computes once more.
"""

import triton
import triton.language as tl

from .scores import natural_scores


@triton.jit
def row_statistics(out, dout, lse, dlse, BASE: tl.constexpr):
    """out, dout (ROWS, COLS), lse and dlse (ROWS) -> lse2, delta, base; BASE: whether rows may have one."""
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1) - dlse
    base = tl.zeros_like(lse)
    if BASE:
        base = tl.where((tl.abs(lse) >= 2906290.0) & (tl.abs(lse) != float("inf")), lse, 0.0)
    lse2 = tl.where(base != 0, 0.0, lse) * 1.4426950408889634
    # Probabilities are at most 1. Where scores are so large that a rounding of them is a factor of 2 and more, lse goes
    # up by a few roundings, so that none overflows.
    lse2 = tl.where(tl.abs(lse2) >= 4194304.0, lse2 + tl.abs(lse2) * 2.384185791015625e-07, lse2)
    return tl.where(tl.abs(lse) == float("inf"), float("inf"), lse2), delta, base


@triton.jit
def from_base(s, base):
    """Natural scores, counted from the base of their row. Those that may be its largest count as it: forward and
    backward may round products differently, by a few units in the last place, each of which may be a factor of e^64."""
    x = s - base
    return tl.where(x > tl.where(base == 0, float("inf"), tl.abs(base) * -4.76837158203125e-07), 0.0, x)


@triton.jit
def with_sums(l2, base, total):
    """lse2 of rows that have a base: the log of their sum. Where none of them is found again, P = 0."""
    return tl.where(base != 0, tl.where(total > 0, tl.log2(total), float("inf")), l2)


@triton.jit
def probabilities(
    dots, l2, base, i, j, position, h, b, seqlen_q, seqlen_k, factor, scale, softcap, alibi, alibi_b, alibi_h,
    bias, bias_b, bias_h, bias_r, bias_c, bias_rows, bias_keys, EXACT: tl.constexpr,
):  # fmt: skip
    """dots = q.k of a tile of rows and keys, or of its transpose -> P, not masked, and tanh where there is a softcap.

    l2, base, i, position broadcast along keys, j along rows; base counts where there is a bias.
    """
    raw = dots
    t = dots
    if softcap is not None or alibi is not None or bias is not None:
        raw, t = natural_scores(
            dots, i, j, position, h, b, seqlen_q, seqlen_k, scale, softcap, alibi, alibi_b, alibi_h,
            bias, bias_b, bias_h, bias_r, bias_c, bias_rows, bias_keys, EXACT,
        )  # fmt: skip
    if bias is not None:
        raw = from_base(raw, base)
    return tl.exp2(tl.fma(raw, factor, -l2)), t


@triton.jit
def score_gradients(p, t, dp, d, softcap, stays, drop_scale):
    """P (masked), tanh, dout . v and delta -> Z P, dU, dS. stays: what dropout keeps, or None."""
    weights = p
    if stays is not None:
        weights = tl.where(stays, p * drop_scale, 0.0)
        dp = tl.where(stays, dp * drop_scale, 0.0)
    ds = p * (dp - d)
    du = ds
    if softcap is not None:
        du = ds * (1.0 - t * t)
    return weights, du, ds
