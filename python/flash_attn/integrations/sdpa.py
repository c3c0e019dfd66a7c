"""torch.nn.functional.scaled_dot_product_attention on this library.

    from flash_attn.integrations import sdpa
    sdpa.enable()            # everywhere, until sdpa.disable()
    with sdpa.routed(): ...  # or here only

What we do not serve goes to PyTorch's own function; `refuses` says in words what that is. Both ways concern the whole
process: every caller that looks the function up in torch.nn.functional (nn.MultiheadAttention and transformers' "sdpa"
do), in every thread. A caller that imported the function itself earlier keeps PyTorch's.

Results are PyTorch's, within rounding, but for dropout, whose mask is drawn from the same generator in another way, and
for derivatives of gradients, which are not served here: differentiate twice with PyTorch's function.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd import forward_ad

from flash_attn import flash_attn_func
from flash_attn._backend import current
from flash_attn.integrations._attend import as_bias

_own = torch.nn.functional.scaled_dot_product_attention  # PyTorch's

_TYPES = (torch.Tensor, torch.nn.Parameter)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def scaled_dot_product_attention(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False
):
    """query (..., nheads, seqlen_q, headdim), key (..., nheads_k, seqlen_k, headdim), value (..., nheads_k, seqlen_k,
    headdim_v), leading dimensions as they broadcast -> (..., nheads, seqlen_q, headdim_v).

    attn_mask broadcasts to (..., nheads, seqlen_q, seqlen_k): bool, True where a key is seen, or added to the scores.
    is_causal: query i sees the keys [0, i], top-left as PyTorch aligns it. enable_gqa: nheads_k may divide nheads.
    """
    arguments = dict(dropout_p=dropout_p, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa)
    if not refuses(query, key, value, attn_mask, **arguments):
        try:
            return _attend(*_as_autocast(query, key, value), attn_mask, dropout_p, is_causal, scale)
        except NotImplementedError:  # by every backend, before anything was written
            pass
    if not enable_gqa:  # torch 2.4 does not know it
        del arguments["enable_gqa"]
    return _own(query, key, value, attn_mask, **arguments)


def refuses(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False) -> str:
    """Why this call goes to PyTorch's own function; "" if it does not. (A backend may refuse more: headdim, say.)"""
    tensors = {"query": query, "key": key, "value": value}
    if attn_mask is not None:
        tensors["attn_mask"] = attn_mask
    for name, x in tensors.items():
        if type(x) not in _TYPES:
            return f"{name}: a {type(x).__name__}, whose class has a say in what is done with it"
        if x.is_nested or x.layout != torch.strided or x.is_quantized:
            return f"{name}: nested, sparse or quantized"
        if x.dim() < 2 and x is not attn_mask:
            return f"{name}: {x.dim()} dimensions"
        if x.device != query.device:
            return f"{name}: on {x.device}, query on {query.device}"
    if query.is_meta or torch.jit.is_tracing():
        return "somebody traces the call without running it"
    if forward_ad._current_level >= 0 or (not _compiling() and torch._C._are_functorch_transforms_active()):
        return "forward-mode derivatives and torch.func transforms"
    # fp64 has a fast kernel in PyTorch and none here: it comes to us where a backend is named.
    served = (*_DTYPES, torch.float64) if not _compiling() and current() else _DTYPES
    if not query.dtype == key.dtype == value.dtype and not torch.is_autocast_enabled(query.device.type):
        return f"dtypes that differ: {query.dtype}, {key.dtype}, {value.dtype}"
    for x in (query, key, value):
        if x.dtype not in served:
            return f"dtype {x.dtype}"
    if attn_mask is not None and is_causal:
        return "attn_mask beside is_causal"
    if attn_mask is not None and attn_mask.dtype not in (torch.bool, torch.float32, query.dtype):
        return f"attn_mask: dtype {attn_mask.dtype}"
    return _refuses_shapes(query, key, value, attn_mask, enable_gqa)


_compiling = torch.compiler.is_compiling


def _refuses_shapes(query, key, value, attn_mask, enable_gqa: bool) -> str:
    shapes = f"{tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}"
    if 0 in query.shape or 0 in key.shape or 0 in value.shape:
        return f"an empty tensor: {shapes}"
    if query.shape[-1] != key.shape[-1] or key.shape[-2] != value.shape[-2]:
        return f"shapes that do not fit: {shapes}"
    ranks = query.dim(), key.dim(), value.dim()
    nheads, nheads_k, nheads_v = (x.shape[-3] if x.dim() > 2 else 1 for x in (query, key, value))
    if enable_gqa:
        if min(ranks) < 3 or nheads_k != nheads_v or nheads % nheads_k:
            return f"enable_gqa: {nheads} heads over {nheads_k} of keys and {nheads_v} of values"
        batches = [x.shape[:-3] for x in (query, key, value)]
        heads = nheads
    else:
        batches = [x.shape[:-2] for x in (query, key, value)]
        heads = None
    if not _broadcastable(batches):
        return f"shapes that do not fit: {shapes}"
    if attn_mask is not None:
        batch = torch.broadcast_shapes(*batches[:2])  # of the scores: the values have no say in it
        full = (*batch, *(() if heads is None else (heads,)), query.shape[-2], key.shape[-2])
        last = full[len(full) - attn_mask.dim() :]
        if attn_mask.dim() > len(full) or any(m not in (1, n) for m, n in zip(attn_mask.shape, last, strict=True)):
            return f"attn_mask: {tuple(attn_mask.shape)} does not broadcast to {full}"
    return ""


def _broadcastable(shapes) -> bool:
    rank = max(map(len, shapes))
    for sizes in zip(*((1,) * (rank - len(shape)) + tuple(shape) for shape in shapes), strict=True):
        if len({n for n in sizes if n != 1}) > 1:
            return False
    return True


def _as_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    return tuple(x.to(torch.get_autocast_dtype(device)) for x in tensors)


def _attend(q, k, v, attn_mask, dropout_p, is_causal, scale) -> Tensor:
    rank = max(q.dim(), k.dim(), v.dim())
    q, k, v = (x.reshape((1,) * (max(rank, 4) - x.dim()) + x.shape) for x in (q, k, v))
    seqlen_q, seqlen_k = q.shape[-2], k.shape[-2]
    if is_causal and seqlen_q < seqlen_k:  # top-left: the keys behind the last query are seen by nobody
        k, v, seqlen_k = k[..., :seqlen_q, :], v[..., :seqlen_q, :], seqlen_q
    if is_causal and seqlen_q > seqlen_k:  # the last queries see all keys: no alignment of ours
        attn_mask = torch.ones((seqlen_q, seqlen_k), dtype=torch.bool, device=q.device).tril()
        is_causal = False
    batch = torch.broadcast_shapes(q.shape[:-3], k.shape[:-3], v.shape[:-3])
    nheads_k = max(k.shape[-3], v.shape[-3])
    # One head of keys for many of queries is grouped attention without a copy; one of queries for many of keys is not.
    nheads = max(q.shape[-3], nheads_k)
    q, k, v = (_flat(x, batch, n) for x, n in ((q, nheads), (k, nheads_k), (v, nheads_k)))
    bias = None if attn_mask is None else _bias(attn_mask, batch, seqlen_k, q.dtype)
    out = flash_attn_func(
        q, k, v, dropout_p, scale, is_causal, attn_bias=bias,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip
    return out.transpose(1, 2).reshape((*batch, nheads, seqlen_q, v.shape[-1])[-rank:])


def _flat(x: Tensor, batch, nheads: int) -> Tensor:
    """(..., nheads|1, seqlen, headdim) -> (batch, seqlen, nheads, headdim)."""
    return x.expand(*batch, nheads, -1, -1).reshape(-1, nheads, *x.shape[-2:]).transpose(1, 2)


def _bias(mask: Tensor, batch, seqlen_k: int, dtype: torch.dtype) -> Tensor:
    """-> (batch|1, nheads|1, seqlen_q|1, seqlen_k)."""
    mask = mask.reshape((1,) * (len(batch) + 3 - mask.dim()) + mask.shape)
    if any(n != 1 for n in mask.shape[:-3]):
        mask = mask.expand(*batch, -1, -1, -1)
    mask = mask.reshape(-1, *mask.shape[-3:])
    if mask.dtype == torch.bool:
        mask = as_bias(mask, dtype)
    return mask.expand(-1, -1, -1, seqlen_k)


_lock = threading.Lock()
_open = 0  # how many routed() blocks are open
_enabled = False


def _route(opened: int = 0, enabled: bool | None = None) -> None:
    global _open, _enabled
    with _lock:
        _open += opened
        _enabled = _enabled if enabled is None else enabled
        ours = _enabled or _open > 0
        torch.nn.functional.scaled_dot_product_attention = scaled_dot_product_attention if ours else _own


def enable() -> None:
    """From now on torch.nn.functional.scaled_dot_product_attention is ours, in the whole process."""
    _route(enabled=True)


def disable() -> None:
    """PyTorch's own again, unless a routed() block is open."""
    _route(enabled=False)


@contextmanager
def routed() -> Iterator[None]:
    """Within the block (and in other threads meanwhile) it is ours. Blocks may nest."""
    _route(opened=1)
    try:
        yield
    finally:
        _route(opened=-1)
