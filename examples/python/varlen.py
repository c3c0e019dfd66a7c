"""Sequences of ragged length: laid end to end they need no padding, in the forward and in the backward.

Of a padded batch, most may be nothing. Here one call takes the sequences as they are; the result and the gradients are
those of a call for each sequence.
"""

import sys

import torch
from flash_attn import flash_attn_func, flash_attn_varlen_func

lengths = [5, 600, 1, 130, 0, 64]
nheads, nheads_k, headdim = 8, 2, 64  # four query heads share one key head
total = sum(lengths)

q = torch.randn(total, nheads, headdim, requires_grad=True)
k, v = (torch.randn(total, nheads_k, headdim, requires_grad=True) for _ in range(2))
dout = torch.randn(total, nheads, headdim)
cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)  # sequence b is rows [cu[b], cu[b + 1])

packed = flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, max(lengths), max(lengths), causal=True)
one_by_one = torch.cat(
    [
        flash_attn_func(*(x[None] for x in parts), causal=True)[0]
        for parts in zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
    ]
)

gradients = zip(*(torch.autograd.grad(out, (q, k, v), dout) for out in (packed, one_by_one)), strict=True)
differences = {"out": (packed - one_by_one).abs().max().item()}
for name, (a, b) in zip(("dq", "dk", "dv"), gradients, strict=True):
    differences[name] = (a - b).abs().max().item()

padded = len(lengths) * max(lengths)
print(f"{len(lengths)} sequences, {total} rows packed, {padded} rows padded: {1 - total / padded:.0%} of them nothing")
print("the largest differences from a call for each:", ", ".join(f"{n} {d:.1e}" for n, d in differences.items()))
if not max(differences.values()) < 1e-5:
    sys.exit("Packing changed the result.")
