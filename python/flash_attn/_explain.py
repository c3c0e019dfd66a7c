"""flash_attn.explain: what a call would do, without doing it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flash_attn import _C, _run
from flash_attn._backend import current
from flash_attn._call import Dropout, Run, Sequences, check_tensors, extended, scores_of
from flash_attn._tensors import empty_lse, empty_out


class Candidate(NamedTuple):
    backend: str
    chosen: bool
    why_not: str  # empty: it serves the call


class Explanation(NamedTuple):
    problem: str
    candidates: list[Candidate]
    plan: str  # of the chosen backend; empty if nobody serves the call
    work: str  # operations and bytes that the call needs on any machine, counted from lengths and mask

    def __str__(self) -> str:
        lines = [self.problem]
        for c in self.candidates:
            lines.append(f"  {'->' if c.chosen else '  '} {c.backend}: {c.why_not or 'serves it'}")
        if self.plan:
            lines.append(f"  plan: {self.plan}")
        lines.append(f"  work: {self.work}")
        return "\n".join(lines)


@extended
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
    seqused_k: Tensor | None = None,
    backward: bool = False,
    score_mod=None,
    mask_mod=None,
    block_sparse_tensors=None,
    **extensions,
) -> Explanation:
    """The arguments of flash_attn_func, or of flash_attn_varlen_func; `seqused_k` (batch): of a KV cache; `backward`:
    of the gradient instead; `score_mod`, `mask_mod`, `block_sparse_tensors`: of flash_attn.cute, not called or read."""
    check_tensors(q=q, k=k, v=v)
    scores = scores_of(softmax_scale, causal, window_size, softcap, alibi_slopes, extensions)
    sequences = Sequences(
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_k=seqused_k, block_table=block_table
    )
    only = None
    if score_mod is not None or mask_mod is not None or block_sparse_tensors is not None:
        from flash_attn import _modified

        _modified.refuse_other_backends()
        only = _modified.BACKEND
    groups = (sequences, scores, Dropout(dropout_p), Run(only or current(), None, deterministic))
    out, lse = empty_out(q, v), empty_lse(q)
    if backward:
        extras = (scores.attn_bias, scores.learnable_sink)
        gradients = [None if x is None else torch.empty_like(x, dtype=torch.float32) for x in extras]
        inputs = [torch.empty_like(x) for x in (q, k, v)]
        call = (torch.empty_like(out), q, k, v, out, lse, *inputs, None, *gradients, *groups)
        answer = _run.explain(_C.explain_backward, *call)
    else:
        answer = _run.explain(_C.explain_forward, q, k, v, out, lse, *groups)
    problem, candidates, plan, work = answer
    candidates = [Candidate(*c) for c in candidates]
    if only is not None:
        candidates, plan = _modified.explained(candidates, plan, q)
    return Explanation(problem, candidates, plan, work)
