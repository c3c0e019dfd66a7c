"""out = sum_j Z_j P_j v_j, and lse, block by block of keys with a running maximum."""

from __future__ import annotations

import torch

from flash_attn._engines.torch.append import append
from flash_attn._engines.torch.attention import Attention
from flash_attn._engines.torch.blocks import slices
from flash_attn._engines.torch.sequences import Writer, as_rows, lse_as_rows


def forward(p, t) -> None:
    a = Attention(p, t)
    append(a)
    out = Writer(as_rows(t.out), a.q_rows)
    lse = None if t.lse is None else Writer(lse_as_rows(t.lse), a.q_rows, p.empty_lse)
    for b in slices(p.batch if a.max_seqlen_q else 0, a.blocks.batch):
        for i in slices(a.max_seqlen_q, a.blocks.rows):
            m, total, weighted = a.softmax(b, i, a.queries(b, i), a.mask.intervals(b, i), values=True)
            empty = m == -torch.inf
            out.put(b, i, (weighted / total).masked_fill(empty, 0.0))
            if lse is not None:
                lse.put(b, i, (m + torch.log(total)).masked_fill(empty, p.empty_lse))
    out.finish()
    if lse is not None:
        lse.finish()
