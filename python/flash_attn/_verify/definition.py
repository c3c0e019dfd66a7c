"""What a case means, written down apart from the core: where rows lie, who sees whom, what is dropped and rotated."""

from __future__ import annotations

import torch
from torch import Tensor

from flash_attn import _run
from flash_attn._call import Dropout, Run, Scores, Sequences
from flash_attn._verify.cases import Case
from flash_attn._verify.instance import SEED, pages_of, starts


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b, summed in fp32 (fp64) and rounded once."""
    wide = torch.promote_types(dtype, torch.float32)
    return (a.to(wide) @ b.to(wide)).to(dtype)


def kept(case: Case, rows: int, keys: int) -> Tensor:
    """(batch, nheads, rows, keys), fp64: what dropout multiplies a probability by. Dropout is a function of position:
    the oracle tells it by a call of that many rows and keys in which all scores are 0 and v is the identity."""
    q = torch.zeros(case.sequences, rows, case.nheads, 1, dtype=torch.float64)
    k = torch.zeros(case.sequences, keys, 1, 1, dtype=torch.float64)
    v = torch.eye(keys, dtype=torch.float64)[:, None].expand(case.sequences, keys, 1, keys)
    out = torch.empty(*q.shape[:3], keys, dtype=torch.float64)
    dropout = Dropout(case.dropout, torch.tensor(SEED))
    _run.forward(q, k, v, out, None, Sequences(), Scores(), dropout, Run("reference"))
    return out.transpose(1, 2) * keys


def visible(case: Case, n: int, m: int) -> tuple[Tensor, Tensor]:
    """-> (n, m) whether query i sees key j, and |position of i - j|. The last query stands at the last key."""
    position, key = torch.arange(n)[:, None] + m - n, torch.arange(m)[None]
    left, right = case.window[0], 0 if case.causal else case.window[1]
    mask = torch.ones(n, m, dtype=torch.bool)
    if left >= 0:
        mask &= key >= position - left
    if right >= 0:
        mask &= key <= position + right
    if case.chunk:
        mask &= position.div(case.chunk, rounding_mode="floor") == key // case.chunk
    return mask, (position - key).abs()


class Places:
    """Where a sequence's rows lie: q[entry, rows], and k[entries[j], key_rows[j]] of each of its keys. Packed tensors
    count as one entry."""

    def __init__(self, case: Case, b: int):
        first, n = (starts(case.lengths_q)[b], case.lengths_q[b]) if case.lengths_q else (0, case.seqlen_q)
        if case.seqused_q:
            n = case.seqused_q[b]
        self.entry, self.rows = 0 if case.lengths_q else b, slice(first, first + n)
        start, used = (starts(case.lengths_k)[b], case.lengths_k[b]) if case.lengths_k else (0, case.seqlen_k)
        if case.used_k >= 0:
            used = case.used_k
        if case.seqused_k:
            used = case.seqused_k[b]
        first_new, new = (
            (starts(case.lengths_new)[b], case.lengths_new[b]) if case.lengths_new else (0, case.seqlen_new)
        )
        self.used, self.new = used, slice(first_new, first_new + new)
        self.new_entry = 0 if case.lengths_new else b
        pad = case.leftpad_k[b] if case.leftpad_k else 0
        entry = case.cache_batch_idx[b] if case.cache_batch_idx else 0 if case.lengths_k else b
        rows = range(start, start + used + new)
        if case.page_size:
            table = pages_of(case)[b]
            where = [(table[t // case.page_size], t % case.page_size) for t in rows]
        else:
            where = [(entry, t) for t in rows]
        entries, key_rows = torch.tensor(where, dtype=torch.int64).view(-1, 2).unbind(1)
        self.keys = (entries[pad:], key_rows[pad:])
        self.appended = (entries[used:], key_rows[used:])


def rotate(case: Case, x: Tensor, position: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (n, heads, headdim), position (n): rotated in fp32 (fp64), and rounded once."""
    wide = torch.promote_types(x.dtype, torch.float32)
    pairs = case.rotary_dim // 2
    if case.interleaved:
        columns = slice(0, case.rotary_dim, 2), slice(1, case.rotary_dim, 2)
    else:
        columns = slice(0, pairs), slice(pairs, case.rotary_dim)
    c, s = cos[position].to(wide)[:, None], sin[position].to(wide)[:, None]
    a, b = (x[..., at].to(wide) for at in columns)
    y = x.clone()
    y[..., columns[0]], y[..., columns[1]] = (a * c - b * s).to(x.dtype), (a * s + b * c).to(x.dtype)
    return y
