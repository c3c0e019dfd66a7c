"""The score pipeline, up to the mask: src/reference/softmax_row.hpp.

A score travels as a "raw" number r and one factor for all: exponents are r * factor in base 2. Where nothing but the
scale happens to q.k, r is q.k itself and the factor is scale * log2(e); else r is the natural score and the factor
is log2(e). So the plain case costs one multiply-add per score.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def tanh(x, EXACT: tl.constexpr):
    """EXACT: to an ulp or two near 0 as well, where the quotient of exponentials cancels."""
    e = tl.exp2(tl.abs(x) * -2.8853900817779268)
    far = (1.0 - e) / (1.0 + e)
    far = tl.where(x < 0, -far, far)
    far = tl.where(x != x, x, far)
    if EXACT:
        y = x * x
        near = -0.0088632355 + y * (0.0035921280 + y * -0.0014558344)
        near = 0.13333333333 + y * (-0.053968253968 + y * (0.021869488536 + y * near))
        near = x + x * y * (-0.33333333333 + y * near)
        return tl.where(tl.abs(x) < 0.45, near, far)
    else:
        return far


@triton.jit
def natural_scores(
    dots, i, j, position, h, b, seqlen_q, seqlen_k, scale, softcap, alibi, alibi_b, alibi_h, bias, bias_b, bias_h,
    bias_r, bias_c, bias_rows, bias_keys, EXACT: tl.constexpr,
):  # fmt: skip
    """-> scores, and tanh where there is a softcap (else the scores again).

    dots is (rows, keys) or its transpose; i, position, h (of each row) and j broadcast to it.
    """
    s = dots * scale
    t = s
    if softcap is not None:
        t = tanh(s / softcap, EXACT)
        s = t * softcap
    if alibi is not None:
        slope = tl.load(alibi + b.to(tl.int64) * alibi_b + h * alibi_h)
        s -= slope * tl.abs(position - j).to(tl.float32)
    if bias is not None:
        where = bias + b.to(tl.int64) * bias_b + h.to(tl.int64) * bias_h + i.to(tl.int64) * bias_r
        known = (i < tl.minimum(bias_rows, seqlen_q)) & (j < tl.minimum(bias_keys, seqlen_k))
        s += tl.load(where + j.to(tl.int64) * bias_c, mask=known, other=0.0).to(tl.float32)
    return s, t
