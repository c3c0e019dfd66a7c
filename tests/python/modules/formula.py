"""An attention layer by its definition in float64, from the layer's own weights."""

from __future__ import annotations

import torch
from support.formula import attention
from torch import Tensor


def close(ours: Tensor, exact: Tensor, name: str = "", bound: float = 4e-6) -> None:
    """fp32 against float64: a few roundings of sums that are as large as the largest element."""
    error, size = ((ours.double() - exact).abs().max().item(), exact.abs().max().item())
    assert ours.shape == exact.shape and error <= bound * (size + 1e-3), (name, error, size)


def rotated(x: Tensor, base: float, dim: int, interleaved: bool, first: int = 0) -> Tensor:
    """x (batch, seqlen, nheads, headdim): pairs of the first dim columns turned by position / base^(2 i / dim)."""
    angles = (torch.arange(x.shape[1]).double() + first)[:, None] * base ** (-torch.arange(0, dim, 2).double() / dim)
    turn = torch.polar(torch.ones_like(angles), angles)[None, :, None]
    head, rest = x[..., :dim], x[..., dim:]
    pairs = head.unflatten(-1, (-1, 2)) if interleaved else head.unflatten(-1, (2, -1)).transpose(-1, -2)
    y = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turn)
    y = y.flatten(-2) if interleaved else y.transpose(-1, -2).flatten(-2)
    return torch.cat([y, rest], dim=-1)


def convolved(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    """x (batch, seqlen, channels): weights of the two positions before, and of this one."""
    w, b = weights[f"{name}.weight"], weights[f"{name}.bias"]
    padded = torch.cat([x.new_zeros(x.shape[0], 2, x.shape[2]), x], dim=1)
    return sum(padded[:, i : i + x.shape[1]] * w[:, 0, i] for i in range(3)) + b


def linear(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0.0)


def mha(layer, weights: dict[str, Tensor], x: Tensor, x_kv: Tensor | None = None, slopes=None, **options) -> Tensor:
    """layer: for its sizes; weights in float64 by the layer's names. -> (batch, seqlen, embed_dim)."""
    h, hk, d = layer.num_heads, layer.num_heads_kv, layer.head_dim
    if layer.cross_attn:
        q, kv = linear(x, weights, "Wq"), linear(x if x_kv is None else x_kv, weights, "Wkv")
    else:
        qkv = linear(x, weights, "Wqkv")
        if layer.dwconv and h == hk:
            qkv = convolved(qkv, weights, "dwconv_qkv")
        q, kv = qkv[..., : h * d], qkv[..., h * d :]
    if layer.dwconv and h != hk:
        q, kv = convolved(q, weights, "dwconv_q"), convolved(kv, weights, "dwconv_kv")
    q, (k, v) = q.unflatten(-1, (h, d)), kv.unflatten(-1, (2, hk, d)).unbind(-3)
    if layer.rotary_emb_dim > 0:
        r = layer.rotary_emb
        q, k = (rotated(t, r.base, layer.rotary_emb_dim, r.interleaved) for t in (q, k))
    out, _ = attention(q, k, v, torch.float64, causal=layer.causal, alibi_slopes=slopes, **options)
    return linear(out.flatten(-2), weights, "out_proj")
