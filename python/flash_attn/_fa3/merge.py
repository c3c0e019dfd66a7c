"""qv: scores q k^T + qv v^T are those of queries [q | qv] and keys [k | v].

MLA with absorbed weights keeps k (the rotary part) and v (the latent part) side by side in one cache, in either order:
such rows are keys as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flash_attn._call import check_tensors
from flash_attn._errors import InvalidArgument, InvalidType


def check_qv(q: Tensor, v: Tensor, qv: Tensor) -> None:
    check_tensors(qv=qv)
    if qv.dtype != q.dtype:
        raise InvalidType(f"qv: expected the dtype of q, {q.dtype}, got {qv.dtype}")
    if q.dim() and v.dim() and qv.shape != (*q.shape[:-1], v.shape[-1]):
        shape = (*q.shape[:-1], v.shape[-1])
        raise InvalidArgument(
            f"qv: expected the shape of q with the headdim of v, {tuple(shape)}, got {tuple(qv.shape)}"
        )


def adjacent(a: Tensor, b: Tensor) -> Tensor | None:
    """Rows [a | b], if those of b lie right behind those of a in the same memory; else None. Without autograd."""
    if a.dim() == 0 or a.dtype != b.dtype or a.device != b.device or a.shape[:-1] != b.shape[:-1]:
        return None
    if a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr():
        return None
    if any(n > 1 and s != t for n, s, t in zip(a.shape[:-1], a.stride(), b.stride(), strict=False)):
        return None
    steps = {x.stride(-1) for x in (a, b) if x.shape[-1] > 1} or {1}
    step = steps.pop()
    if steps or b.storage_offset() - a.storage_offset() != a.shape[-1] * step:
        return None
    return a.detach().as_strided(
        (*a.shape[:-1], a.shape[-1] + b.shape[-1]), (*a.stride()[:-1], step), a.storage_offset()
    )


def merge(q: Tensor, k: Tensor, v: Tensor, qv: Tensor, in_place: bool) -> tuple[Tensor, Tensor]:
    """-> queries and keys. `in_place`: memory may be looked at, and nobody wants gradients."""
    if in_place:
        if (keys := adjacent(k, v)) is not None:
            queries = adjacent(q, qv)
            return torch.cat([q, qv], -1) if queries is None else queries, keys
        if (keys := adjacent(v, k)) is not None:
            queries = adjacent(qv, q)
            return torch.cat([qv, q], -1) if queries is None else queries, keys
    return torch.cat([q, qv], -1), join(k, v)


def join(k: Tensor, v: Tensor) -> Tensor:
    """[k | v], a copy. Malformed ones are left to the core's words."""
    return torch.cat([k, v], -1) if k.dim() and k.shape[:-1] == v.shape[:-1] and k.dtype == v.dtype else k
