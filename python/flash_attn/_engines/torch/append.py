"""New keys and values join the cache, the keys rotated, before anybody attends."""

from __future__ import annotations

import torch
from torch import Tensor

from flash_attn._engines.torch.attention import Attention
from flash_attn._engines.torch.blocks import ELEMENTS, slices
from flash_attn._engines.torch.sequences import Lengths, as_rows, positions


def _of(x: Lengths, b: Tensor) -> Lengths:
    return x[b] if isinstance(x, Tensor) else x


def append(a: Attention) -> None:
    p, t = a.p, a.t
    if t.new_k is None or p.batch * p.batch_k * p.rows_k * p.seqlen_k == 0:
        return
    packed = t.cu_seqlens_new is not None
    new_k, new_v = as_rows(t.new_k), as_rows(t.new_v)
    step = max(1, ELEMENTS // (p.nheads_k * max(p.headdim, p.headdim_v)))
    for r in slices(p.rows_new * (1 if packed else p.batch), step):
        r = positions(r, a.device)  # rows of the new keys, whosesoever
        entry, row = r // p.rows_new, r % p.rows_new
        b, i, valid = entry, row, None
        if packed:
            b = torch.searchsorted(t.cu_seqlens_new[1:].long(), row, right=True).clamp(max=p.batch - 1)
            i = row - a.sequences.new_start[b]
            valid = i < a.sequences.new[b]
        k, v = new_k[entry, row], new_v[entry, row]  # (n, heads, cols)
        if a.rotary is not None:
            k = a.rotary(k, _of(a.rotary.first, b) + i)
        places = a.k_rows.locate(b, _of(a.sequences.used, b) + i)
        if valid is None:
            t.k[places], t.v[places] = k, v
        else:
            _write_valid(t.k, t.v, k, v, places, valid)


def _write_valid(cache_k: Tensor, cache_v: Tensor, k: Tensor, v: Tensor, places, valid: Tensor) -> None:
    """Rows that belong to no sequence are written too, as copies of the first row that does, to its place.

    A device cannot leave rows out without telling the host how many. If no row belongs to a sequence, the first place
    gets what it holds.
    """
    first = valid.to(torch.int32).argmax()
    source = torch.where(valid, torch.arange(valid.shape[0], device=valid.device), first)
    places = tuple(x[source] for x in places)
    for cache, x in ((cache_k, k), (cache_v, v)):
        cache[places] = torch.where(valid.any(), x[source], cache[places])
