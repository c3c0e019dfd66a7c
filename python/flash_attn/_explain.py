"""flash_attn.explain: what a call would do, without doing it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flash_attn import _C, _ops
from flash_attn._options import options


class Candidate(NamedTuple):
    backend: str
    chosen: bool
    why_not: str  # empty: it serves the call


class Explanation(NamedTuple):
    problem: str
    candidates: list[Candidate]
    plan: str  # of the chosen backend; empty if nobody serves the call

    def __str__(self) -> str:
        lines = [self.problem]
        for c in self.candidates:
            lines.append(f"  {'->' if c.chosen else '  '} {c.backend}: {c.why_not or 'serves it'}")
        if self.plan:
            lines.append(f"  plan: {self.plan}")
        return "\n".join(lines)


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    block_table: Tensor | None = None,
    *,
    learnable_sink: Tensor | None = None,
    attn_bias: Tensor | None = None,
    backward: bool = False,
) -> Explanation:
    """The arguments of flash_attn_func, or of flash_attn_varlen_func; `backward`: of its gradient instead."""
    _ops.check_tensors(q=q, k=k, v=v)
    left, right = _ops.window(window_size)
    opts = options(
        softmax_scale, causal, left, right, softcap, alibi_slopes, attn_bias, learnable_sink, cu_seqlens_q,
        cu_seqlens_k, max_seqlen_q, max_seqlen_k, None, None, block_table, dropout_p, deterministic=deterministic,
    )  # fmt: skip
    out, lse = _ops.empty_out(q, v), _ops.empty_lse(q)
    if backward:
        extensions = (attn_bias, learnable_sink)
        gradients = [None if x is None else torch.empty_like(x, dtype=torch.float32) for x in extensions]
        inputs = [torch.empty_like(x) for x in (q, k, v)]
        answer = _C.explain_backward(torch.empty_like(out), q, k, v, out, lse, *inputs, None, *gradients, opts)
    else:
        answer = _C.explain_forward(q, k, v, out, lse, opts)
    problem, candidates, plan = answer
    return Explanation(problem, [Candidate(*c) for c in candidates], plan)
