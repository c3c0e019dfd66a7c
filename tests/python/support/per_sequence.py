"""What a call with tables means: every sequence cut out of its memory, attended to by the oracle alone, and put back.

Takes what make_problem takes (without new keys, rotation and dropout), in fp64, with well-formed tables.
"""

from __future__ import annotations

import flash_attn
import torch
from torch import Tensor


def chunk_bias(seqlen_q: int, seqlen_k: int, chunk: int) -> Tensor:
    """(seqlen_q, seqlen_k): -inf for keys outside the chunk in which a query stands."""
    position = torch.arange(seqlen_q)[:, None] + seqlen_k - seqlen_q
    same = position.div(chunk, rounding_mode="floor") == torch.arange(seqlen_k)[None] // chunk
    return torch.zeros(seqlen_q, seqlen_k, dtype=torch.float64).masked_fill(~same, -torch.inf)


def places(b: int, a: dict) -> tuple[tuple, list[tuple[int, int]]]:
    """Sequence b: the index of its rows of q (entry, slice), and (entry, row) of each of its keys."""
    cu_q, cu_k, table = (a.get(name) for name in ("cu_seqlens_q", "cu_seqlens_k", "block_table"))
    rows = (0, int(cu_q[b]), int(cu_q[b + 1])) if cu_q is not None else (b, 0, a["q"].shape[1])
    if a.get("seqused_q") is not None:
        rows = (*rows[:2], rows[1] + int(a["seqused_q"][b]))
    size = a["k"].shape[-3]
    start, length = 0, size if table is None else table.shape[1] * size
    if cu_k is not None:
        start, length = (0 if table is not None else int(cu_k[b])), int(cu_k[b + 1] - cu_k[b])
    if a.get("used_k", -1) >= 0:
        length = a["used_k"]
    if a.get("seqused_k") is not None:
        length = int(a["seqused_k"][b])
    pad = 0 if a.get("leftpad_k") is None else int(a["leftpad_k"][b])
    entry = 0 if cu_k is not None else b
    if a.get("cache_batch_idx") is not None:
        entry = int(a["cache_batch_idx"][b])
    keys = range(start + pad, start + length)
    where = [(entry, t) if table is None else (int(table[b, t // size]), t % size) for t in keys]
    return (rows[0], slice(*rows[1:])), where


def attend(dout: Tensor, dlse: Tensor, a: dict) -> dict[str, Tensor]:
    """-> out, lse and the gradients, by name."""

    def rows(x):
        return x if x.dim() == 4 else x[None]

    q, k, v, g = (rows(x) for x in (a["q"], a["k"], a["v"], dout))
    lse_rows = (lambda x: x.transpose(1, 2)) if dlse.dim() == 3 else (lambda x: x.t()[None])
    bias, sink, slopes = a.get("bias"), a.get("sink"), a.get("alibi_slopes")
    results = {
        "out": torch.zeros_like(g), "lse": torch.full_like(lse_rows(dlse), torch.inf),
        "dq": torch.zeros_like(q), "dk": torch.zeros_like(k), "dv": torch.zeros_like(v),
    }  # fmt: skip
    results |= {
        "d" + n: torch.zeros(x.shape, dtype=torch.float64) for n, x in (("bias", bias), ("sink", sink)) if x is not None
    }
    batch = q.shape[0] if a.get("cu_seqlens_q") is None else a["cu_seqlens_q"].numel() - 1
    for b in range(batch):
        at, keys = places(b, a)
        entries, key_rows = (torch.tensor([place[d] for place in keys], dtype=torch.int64) for d in (0, 1))
        leaves = {"q": q[at], "k": k[entries, key_rows], "v": v[entries, key_rows]}
        n, m = leaves["q"].shape[0], len(keys)
        if n == 0:
            continue
        extra = {}
        if sink is not None:
            leaves["sink"] = extra["learnable_sink"] = sink.double().requires_grad_()
        if bias is not None or a.get("chunk"):
            own = torch.zeros(1, 1, n, m, dtype=torch.float64)
            if a.get("chunk"):
                own = own + chunk_bias(n, m, a["chunk"])
            if bias is not None:
                cut = (slice(b, b + 1) if bias.shape[0] > 1 else slice(None), slice(None),
                       slice(0, n) if bias.shape[2] > 1 else slice(None), slice(0, m))  # fmt: skip
                leaves["bias"] = bias[cut].double().requires_grad_()
                own = own + leaves["bias"]
            extra["attn_bias"] = own
        for name in "qkv":
            leaves[name] = leaves[name].clone().requires_grad_()
        if slopes is not None:
            extra["alibi_slopes"] = slopes[b] if slopes.dim() == 2 else slopes
        with flash_attn.backend("reference"):
            out, lse, *_ = flash_attn.flash_attn_func(
                *(leaves[name][None] for name in "qkv"), causal=a.get("causal", False), return_attn_probs=True,
                window_size=a.get("window_size", (-1, -1)), softcap=a.get("softcap", 0.0), **extra,
            )  # fmt: skip
            incoming = (g[at][None], lse_rows(dlse)[at].t()[None])
            gradients = dict(zip(leaves, torch.autograd.grad((out, lse), leaves.values(), incoming), strict=True))
        results["out"][at], results["lse"][at] = out[0].detach(), lse[0].t().detach()
        results["dq"][at] = gradients["q"]
        results["dk"][entries, key_rows], results["dv"][entries, key_rows] = gradients["k"], gradients["v"]
        if sink is not None:
            results["dsink"] += gradients["sink"]
        if bias is not None:
            results["dbias"][cut] += gradients["bias"]
    results["lse"] = results["lse"].transpose(1, 2) if dlse.dim() == 3 else results["lse"][0].t()
    for name, like in (("out", dout), ("dq", a["q"]), ("dk", a["k"]), ("dv", a["v"])):
        results[name] = results[name].view(like.shape)
    return results
