"""What FlashAttention-3's functions add to the formula: qv, chunks, and lse = -inf where a row sees nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from support import formula
from support.per_sequence import chunk_bias


def attention(
    q: Tensor,  # (batch, seqlen_q, nheads, headdim)
    k: Tensor,
    v: Tensor,  # (batch, seqlen_k, nheads_k, headdim_v)
    dtype: torch.dtype,
    *,
    qv: Tensor | None = None,  # (batch, seqlen_q, nheads, headdim_v)
    attention_chunk: int = 0,
    **options,
) -> tuple[Tensor, Tensor]:
    """-> out, lse; see formula.attention."""
    if qv is not None:  # q k^T + qv v^T is one product of longer rows
        q, k = torch.cat([q, qv], -1), torch.cat([k, v], -1)
    if attention_chunk:
        bias = chunk_bias(q.shape[1], k.shape[1], attention_chunk)[None, None]
        given = options.pop("attn_bias", None)
        options["attn_bias"] = bias if given is None else bias + given
    out, lse = formula.attention(q, k, v, dtype, **options)
    return out, torch.where(lse == torch.inf, -torch.inf, lse)


def varlen(
    q: Tensor, k: Tensor, v: Tensor, dtype: torch.dtype, starts_q, starts_k, used_q, used_k, qv=None, **options
) -> tuple[Tensor, Tensor]:
    """Sequence by sequence, used rows only: the other rows of out are 0, of lse -inf."""
    out = torch.zeros((*q.shape[:-1], v.shape[-1]), dtype=dtype)
    lse = torch.full((q.shape[1], q.shape[0]), -torch.inf, dtype=torch.float64 if dtype == torch.float64 else None)
    outs, lses = out.unbind(0), lse.unbind(1)
    outs, lses = list(outs), list(lses)
    for a, b, n, m in zip(starts_q, starts_k, used_q, used_k, strict=False):
        more = {} if qv is None else {"qv": qv[None, a : a + n]}
        o, s = attention(q[None, a : a + n], k[None, b : b + m], v[None, b : b + m], dtype, **more, **options)
        outs[a : a + n] = o[0].unbind(0)
        lses[a : a + n] = s[0].unbind(1)
    return torch.stack(outs), torch.stack(lses, 1)
