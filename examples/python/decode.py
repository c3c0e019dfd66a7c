"""Decoding with a KV cache in pages: a prompt, then token by token, against one causal call over everything.

Keys are rotated and written to their rows of the cache, queries rotated, and all attended to, in one call a step. Pages
may be of any size, and the caches of several sequences of unlike length share one pool.
"""

import sys

import torch
from flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache

prompts, steps = [37, 5, 130], 20
nheads, nheads_k, headdim, page_size = 8, 2, 64, 16
lengths = [n + steps for n in prompts]

# All queries, keys and values of each sequence, as a model would have made them one after the other.
q, k, v = ([torch.randn(n, heads, headdim) for n in lengths] for heads in (nheads, nheads_k, nheads_k))
angle = torch.arange(max(lengths))[:, None] / 10000 ** (torch.arange(headdim // 2) / (headdim // 2))
cos, sin = angle.cos(), angle.sin()  # (position, headdim / 2)

# A pool of pages, handed out in a random order.
pages = [-(-n // page_size) for n in lengths]
k_cache, v_cache = torch.empty(2, sum(pages), page_size, nheads_k, headdim)
order = iter(torch.randperm(sum(pages)).tolist())
block_table = torch.zeros(len(lengths), max(pages), dtype=torch.int32)
for b, n in enumerate(pages):
    block_table[b, :n] = torch.tensor([next(order) for _ in range(n)])


def ragged(parts: list, spans: list) -> tuple:
    """Rows [start, end) of each sequence, end to end, and where each one's begin."""
    rows = torch.cat([x[a:b] for x, (a, b) in zip(parts, spans, strict=True)])
    return rows, torch.tensor([0, *(b - a for a, b in spans)]).cumsum(0).to(torch.int32)


outs: list = [[] for _ in lengths]
spans = [(0, n) for n in prompts]
for _ in range(steps + 1):
    (new_q, cu), (new_k, _), (new_v, _) = (ragged(x, spans) for x in (q, k, v))
    out = flash_attn_with_kvcache(
        new_q, k_cache, v_cache, new_k, new_v, cos, sin, torch.tensor([a for a, _ in spans], dtype=torch.int32),
        block_table=block_table, causal=True, rotary_interleaved=False, cu_seqlens_q=cu, cu_seqlens_k_new=cu,
    )  # fmt: skip
    for b, rows in enumerate(out.split(cu.diff().tolist())):
        outs[b].append(rows)
    spans = [(b, b + 1) for _, b in spans]


def rotated(x: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, -1)
    c, s = cos[: len(x), None], sin[: len(x), None]
    return torch.cat([a * c - b * s, a * s + b * c], -1)


whole = [(0, n) for n in lengths]
(all_q, cu), (all_k, _), (all_v, _) = (ragged(x, whole) for x in ([rotated(x) for x in q], [rotated(x) for x in k], v))
want = flash_attn_varlen_func(all_q, all_k, all_v, cu, cu, max(lengths), max(lengths), causal=True)
difference = (torch.cat([row for rows in outs for row in rows]) - want).abs().max().item()
print(f"{len(prompts)} prompts of {prompts} tokens and {steps} steps, in {sum(pages)} pages of {page_size} keys")
print(f"the largest difference from one causal call: {difference:.1e}")
if not difference < 1e-5:
    sys.exit("Decoding step by step changed the result.")
