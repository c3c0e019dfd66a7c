"""Memory for results, and whether tensors are plain: ordinary ones that nobody traces."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from flash_attn._call import Scores

_PLAIN_TYPES = (torch.Tensor, torch.nn.Parameter)
_is_compiling = torch.compiler.is_compiling
_dispatch_modes = torch._C._len_torch_dispatch_stack
_functorch_active = torch._C._are_functorch_transforms_active
_tracing_state = torch._C._get_tracing_state


def is_plain(*tensors: Tensor) -> bool:
    """Whether these are ordinary tensors with memory, and nobody watches what is done with them."""
    if _is_compiling():
        return False
    for x in tensors:
        if type(x) not in _PLAIN_TYPES:
            return False
    return not (
        tensors[0].is_meta
        or _dispatch_modes()
        or _functorch_active()
        or _tracing_state() is not None
        or forward_ad._current_level >= 0
    )


def result_of_function(x: Tensor) -> Tensor:
    """`x` as the result of an autograd.Function's forward.

    Where an operation in place, or one that does nothing, gave x its last value, torch.compile of PyTorch 2.11 takes it
    for two results, and the gradient is zero. In a compiled graph this is a copy, which compilers leave out.
    """
    return x.clone() if _is_compiling() else x


CORE_DTYPES = torch.float32, torch.bfloat16, torch.float16


def core_reads(*tensors: Tensor) -> bool:
    """Whether these are plain tensors of the CPU in a dtype that the compiled core computes with."""
    return all(t.is_cpu and t.dtype in CORE_DTYPES and not t.is_neg() for t in tensors) and is_plain(*tensors)


def empty_out(q: Tensor, v: Tensor) -> Tensor:
    """Memory for out, (..., nheads, headdim_v). Malformed ranks get some memory too: the core says what is wrong."""
    if v.dim() == 0 or q.dim() == 0 or v.shape[-1] == q.shape[-1]:
        return torch.empty_like(q)
    return q.new_empty((*q.shape[:-1], v.shape[-1]))


def empty_lse(q: Tensor) -> Tensor:
    """Memory for softmax_lse: (batch, nheads, seqlen_q), or (nheads, total_q) of packed sequences."""
    if q.dim() == 4:
        return torch.empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32, device=q.device)
    return torch.empty((q.shape[1], q.shape[0]) if q.dim() == 3 else (0,), dtype=torch.float32, device=q.device)


def unpacked(inputs: tuple) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of (q, k, v), (q, kv) or (qkv,): kv is (..., 2, nheads_k, headdim), qkv (..., 3, nheads, headdim)."""
    if len(inputs) == 3:
        return inputs
    if len(inputs) == 2:
        return inputs[0], *inputs[1].unbind(-3)
    return inputs[0].unbind(-3)


def empty_gradients(q: Tensor, k: Tensor, v: Tensor, packing: int) -> tuple[tuple, tuple]:
    """-> memory for the gradients of `inputs` as unpacked() takes them, and dq, dk, dv as views of it.

    `packing`: 0 for (q, k, v), 1 for (q, kv), 2 for (qkv,). So the gradient of qkv is written where it is wanted.
    """
    if packing == 0:
        results = tuple(torch.empty_like(x) for x in (q, k, v))
        return results, results
    first = (q, k)[2 - packing]
    packed = first.new_empty((*first.shape[:-2], packing + 1, *first.shape[-2:]))
    results = (torch.empty_like(q), packed) if packing == 1 else (packed,)
    return results, unpacked(results)


def empty_extras(scores: Scores, wants_dsink: bool, wants_dbias: bool) -> tuple[Tensor | None, Tensor | None]:
    """Memory for dsink and dbias, in fp32: they are sums."""
    dsink = torch.empty_like(scores.learnable_sink, dtype=torch.float32) if wants_dsink else None
    dbias = torch.empty_like(scores.attn_bias, dtype=torch.float32) if wants_dbias else None
    return dsink, dbias
