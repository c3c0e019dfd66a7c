"""Attention as PyTorch operations, written from the definition and independent of the package under test.

With dtype float64 it is the measure. With a lower dtype it is the plain arithmetic that we must not be worse than:
products in that dtype, the softmax in fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor


def visible(seqlen_q: int, seqlen_k: int, causal: bool, window: tuple[int, int]) -> Tensor:
    """(seqlen_q, seqlen_k) bool: whether query i sees key j. Bottom-right aligned."""
    position = torch.arange(seqlen_q)[:, None] + seqlen_k - seqlen_q
    key = torch.arange(seqlen_k)[None, :]
    left, right = window[0], 0 if causal else window[1]
    mask = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool)
    if left >= 0:
        mask &= key >= position - left
    if right >= 0:
        mask &= key <= position + right
    return mask


def attention(
    q: Tensor,  # (batch, seqlen_q, nheads, headdim)
    k: Tensor,  # (batch, seqlen_k, nheads_k, headdim)
    v: Tensor,  # (batch, seqlen_k, nheads_k, headdim_v)
    dtype: torch.dtype,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    attn_bias: Tensor | None = None,
    learnable_sink: Tensor | None = None,
    dropout: Tensor | None = None,  # (batch, nheads, seqlen_q, seqlen_k): what probabilities are multiplied by
    score_mod=None,  # (score, b, h, i, j) -> score and (b, h, i, j) -> bool, of tensors that broadcast together
    mask_mod=None,
) -> tuple[Tensor, Tensor]:
    """-> out (batch, seqlen_q, nheads, headdim_v), lse (batch, nheads, seqlen_q), +inf where a row sees nothing."""
    soft = torch.float64 if dtype == torch.float64 else torch.float32
    group = q.shape[2] // k.shape[2]
    q, k, v = q.to(dtype), k.to(dtype).repeat_interleave(group, 2), v.to(dtype).repeat_interleave(group, 2)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    seqlen_q, seqlen_k = q.shape[1], k.shape[1]

    s = torch.einsum("bihd,bjhd->bhij", q, k).to(soft) * scale
    if softcap > 0:
        s = softcap * torch.tanh(s / softcap)
    if alibi_slopes is not None:
        distance = (torch.arange(seqlen_q)[:, None] + seqlen_k - seqlen_q - torch.arange(seqlen_k)[None, :]).abs()
        s = s - alibi_slopes.to(soft).reshape(-1, alibi_slopes.shape[-1], 1, 1) * distance
    if attn_bias is not None:
        s = s + attn_bias.to(soft)
    mask = visible(seqlen_q, seqlen_k, causal, window_size)
    indices = torch.meshgrid(*(torch.arange(n) for n in s.shape), indexing="ij")
    if score_mod is not None:
        s = score_mod(s, *indices)
    if mask_mod is not None:
        mask = mask & mask_mod(*indices)
    sink = None if learnable_sink is None else learnable_sink.to(soft).reshape(1, -1, 1, 1)

    top = s.detach().masked_fill(~mask, -torch.inf)
    top = top.amax(-1, keepdim=True) if seqlen_k else top.new_full((*top.shape[:-1], 1), -torch.inf)
    if sink is not None:
        top = torch.maximum(top, sink.detach())
    top = top.masked_fill(top == -torch.inf, 0)
    e = torch.exp(torch.where(mask, s, top) - top).masked_fill(~mask, 0)
    total = e.sum(-1, keepdim=True)
    if sink is not None:
        total = total + torch.exp(sink - top)
    nothing = total == 0
    total = total.masked_fill(nothing, 1)
    p = e / total if dropout is None else e / total * dropout
    out = torch.einsum("bhij,bjhd->bihd", p.to(dtype), v)
    lse = (top + torch.log(total)).masked_fill(nothing, torch.inf).squeeze(-1)
    return out, lse


def attention_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, dtype: torch.dtype, **options
) -> tuple[Tensor, Tensor]:
    """q (total_q, nheads, headdim) -> out (total_q, nheads, headdim_v), lse (nheads, total_q), sequence by sequence.

    attn_bias and dropout are (batch|1, nheads|1, rows|1, keys), rows and keys at least those of the longest sequence.
    """
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    slopes = options.pop("alibi_slopes", None)
    matrices = {name: options.pop(name) for name in ("attn_bias", "dropout") if options.get(name) is not None}
    outs, lses = [], []
    for b in range(len(starts_q) - 1):
        rows, keys = slice(*starts_q[b : b + 2]), slice(*starts_k[b : b + 2])
        mine = slopes[b] if slopes is not None and slopes.dim() == 2 else slopes
        here = {name: x[min(b, x.shape[0] - 1), :, : rows.stop - rows.start, : keys.stop - keys.start][None]
                for name, x in matrices.items()}  # fmt: skip
        out, lse = attention(q[None, rows], k[None, keys], v[None, keys], dtype, alibi_slopes=mine, **here, **options)
        outs.append(out[0])
        lses.append(lse[0])
    tail = q.shape[0] - starts_q[-1]
    outs.append(q.new_zeros((tail, q.shape[1], v.shape[2]), dtype=dtype))
    lses.append(lses[0].new_full((q.shape[1], tail), torch.inf) if lses else q.new_full((q.shape[1], tail), torch.inf))
    return torch.cat(outs), torch.cat(lses, dim=1)
