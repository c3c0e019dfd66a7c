"""A Problem as one call of FlagGems' packed attention, and its results as the core wants them.

Of FlagGems' two entry points only flash_attn_varlen_func is used. The dense one (flash_attention_forward) is wrong for
masks at some lengths that nobody has pinned down, so no check of a few lengths can clear it, and it compiles anew for
every batch size.

What the packed one does differently, as read in release 5.0.2 and seen with its kernel in the interpreter of Triton 3.6
(the adapter as a whole has not been run on a device):

- A side of a window that is at least max_seqlen_k becomes -1, and -1 on the left turns the window off, -1 on the right
  hides the diagonal. So every window is given with two sides, and a max_seqlen_k that exceeds both.
- ALiBi under `causal` leaves out what is the same for a whole row: out is right, lse is off by
  slope * (seqlen_q - 1 - i). As a window (limit, 0) the same mask takes the full formula.
- One query and grouped heads: the heads of a group take the place of queries. It assumes row b of q to be sequence b,
  which packed queries need not obey, and returns lse of (key head, sequence, member) in the shape (head, sequence).
  Told of two queries, it does not do so.
- lse is (nheads, total_q), +inf where a row sees nothing; rows of no sequence are left as they were, in out too.
- Used lengths of keys are read with pages only; a cache without pages is one page per sequence.
- Tables are believed, and offsets are 32-bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flash_attn._errors import NotServed

_MAX_OFFSET = 2**31 - 1


def reads_pages(p) -> bool:
    return p.page_size > 0 or p.uses("seqused_k")


def refusal(p) -> str:
    """What capability data cannot say; empty if there is nothing."""
    if not p.scale > 0:  # masked scores are -inf before the scale: -inf * 0 is NaN, -inf * -1 is +inf
        return f"softmax_scale: {p.scale:g} is not served by FlagGems (positive ones are)"
    if p.uses("seqused_k") and p.uses("packed_k") and not p.page_size:
        return "seqused_k: FlagGems takes either cu_seqlens_k or seqused_k"
    for name, elements in (
        ("q", p.batch_q * p.rows_q * p.nheads * p.headdim),
        ("k", p.batch_k * p.rows_k * p.nheads_k * p.headdim),
    ):
        if elements > _MAX_OFFSET:
            return _too_large(name, elements)
    return ""


def sides(p) -> tuple[int, int]:
    """The window (left, right), -1 for a side that hides nothing: key and row are less than the lengths apart."""
    longest = max(p.max_seqlen_q, p.max_seqlen_k)
    return tuple(-1 if side >= longest else side for side in (p.window_left, p.window_right))


def mask_arguments(p) -> dict:
    left, right = sides(p)
    arguments = {"causal": False, "window_size": (-1, -1), "max_seqlen_k": p.max_seqlen_k}
    if left < 0 and right < 0:
        return arguments
    if left < 0 and right == 0 and not (p.uses("alibi") and p.uses("lse")):
        return arguments | {"causal": True}
    # Powers of two: FlagGems compiles a kernel for every window. 1000 keys: 1024.
    limit = 1 << max(p.max_seqlen_q, p.max_seqlen_k).bit_length()
    left, right = (limit if side < 0 else side for side in (left, right))
    return arguments | {"window_size": (left, right), "max_seqlen_k": max(p.max_seqlen_k, left + 1, right + 1)}


def forward(varlen, p, t) -> None:
    """`varlen`: FlagGems' flash_attn_varlen_func. Writes t.out, and t.lse unless it is None."""
    if p.batch == 0 or p.max_seqlen_q == 0 or p.max_seqlen_k == 0:
        t.out.zero_()
        if t.lse is not None:
            t.lse.fill_(p.empty_lse)
        return
    packed = t.cu_seqlens_q is not None
    q = _check_offsets("q", _rows(t.q))
    out = _view_of_rows(t.out)
    in_place = out is not None
    if not in_place:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
    if packed:
        out.zero_()
    cu_seqlens_q = t.cu_seqlens_q.clamp(0, p.rows_q) if packed else _cu_seqlens(p.batch, p.seqlen_q, q.device)
    max_seqlen_q = max(2, p.max_seqlen_q) if packed or t.lse is not None else p.max_seqlen_q
    slopes = t.alibi_slopes
    _, lse = varlen(
        q=q,
        max_seqlen_q=max_seqlen_q,
        cu_seqlens_q=cu_seqlens_q,
        softmax_scale=p.scale,
        softcap=p.softcap,
        alibi_slopes=slopes if slopes is None or slopes.stride(-1) == 1 else slopes.contiguous(),
        return_softmax_lse=True,
        out=_check_offsets("out", out),
        **_keys(p, t),
        **mask_arguments(p),
    )
    if not in_place:
        t.out.copy_(out.view(t.out.shape))
    if t.lse is None:
        return
    if packed:
        row = torch.arange(q.shape[0], device=q.device)
        lse = torch.where((row >= cu_seqlens_q[0]) & (row < cu_seqlens_q[-1]), lse, p.empty_lse)
    else:
        lse = lse.view(p.nheads, p.batch, p.seqlen_q).transpose(0, 1)
    t.lse.copy_(torch.where(lse == torch.inf, p.empty_lse, lse))


def _keys(p, t) -> dict:
    """k, v and where the keys of every sequence lie in them."""
    if not reads_pages(p):
        k, v = _of_equal_strides(_rows(t.k), _rows(t.v))
        packed = t.cu_seqlens_k is not None
        cu = t.cu_seqlens_k.clamp(0, p.rows_k) if packed else _cu_seqlens(p.batch, p.seqlen_k, k.device)
        return {"k": _check_offsets("k", k), "v": v, "cu_seqlens_k": cu}
    k, v = _of_equal_strides(t.k, t.v, copies=False)
    if t.block_table is None:
        table = torch.arange(p.batch, dtype=torch.int32, device=k.device)[:, None]
    else:
        table = t.block_table.clamp(0, p.batch_k - 1)
    step = _page_step(_check_offsets("k", k))
    return {"k": k, "v": v, "seqused_k": _lengths(p, t), "block_table": table if step == 1 else table * step}


def _lengths(p, t) -> Tensor:
    """int32 (batch): keys in use of every sequence."""
    if t.seqused_k is not None:
        return t.seqused_k.clamp(0, p.seqlen_k)
    if p.used_k >= 0:
        return torch.full((p.batch,), min(p.used_k, p.seqlen_k), dtype=torch.int32, device=t.q.device)
    if t.cu_seqlens_k is not None:
        return t.cu_seqlens_k.diff().clamp(0, p.seqlen_k)
    return torch.full((p.batch,), p.seqlen_k, dtype=torch.int32, device=t.q.device)


def _page_step(k: Tensor) -> int:
    """By how many pages page 1 lies behind page 0 of k (pages, size, heads, headdim): 1, or 2 where pages of k and v
    take turns. FlagGems finds row r of page b at (b * size + r) * stride of a row."""
    pages, size = k.shape[:2]
    step, rest = divmod(k.stride(0), size * k.stride(1))
    if pages > 1 and (rest or step < 1):
        raise NotServed(
            f"k: FlagGems reads pages (or entries of a cache) that lie a multiple of their own size apart, "
            f"{size} rows of {k.stride(1)} elements; got {k.stride(0)} elements"
        )
    return step if pages > 1 else 1


def _cu_seqlens(batch: int, seqlen: int, device) -> Tensor:
    return torch.arange(0, (batch + 1) * seqlen, seqlen, dtype=torch.int32, device=device)


def _view_of_rows(x: Tensor) -> Tensor | None:
    """(batch, seqlen, heads, cols) or (total, heads, cols) -> (total, heads, cols); None if rows lie at no one
    distance."""
    if x.dim() == 3:
        return x
    try:
        return x.view(x.shape[0] * x.shape[1], *x.shape[2:])
    except RuntimeError:
        return None


def _rows(x: Tensor) -> Tensor:
    rows = _view_of_rows(x)
    return x.flatten(0, 1) if rows is None else rows


def _of_equal_strides(k: Tensor, v: Tensor, copies: bool = True) -> tuple[Tensor, Tensor]:
    if k.stride() == v.stride():
        return k, v
    if all(n <= 1 or a == b for n, a, b in zip(k.shape, k.stride(), v.stride(), strict=True)):
        return k, v.as_strided(v.shape, k.stride())
    if not copies:
        raise NotServed(f"v: FlagGems reads a cache whose k and v have the same strides; {k.stride()}, {v.stride()}")
    return tuple(x.clone(memory_format=torch.contiguous_format) for x in (k, v))


def _check_offsets(name: str, x: Tensor) -> Tensor:
    last = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
    if last > _MAX_OFFSET:
        raise NotServed(_too_large(name, last + 1))
    return x


def _too_large(name: str, elements: int) -> str:
    return f"{name}: spans {elements} elements; FlagGems counts them in 32 bits"
