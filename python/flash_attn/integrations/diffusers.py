"""Hugging Face diffusers on this library, with any model of its attention dispatcher and on any device.

    from flash_attn.integrations import diffusers
    diffusers.enable()
    pipe.transformer.set_attention_backend("flash")

diffusers has backends named "flash", "flash_varlen", "_flash_3" and "_flash_varlen_3", which call FlashAttention-2 and
-3. "flash" and "flash_varlen" call us without any of this, where the metadata of a distribution "flash-attn" is found:
in 16 bits; "flash" takes no mask, and "flash_varlen" takes every mask for one that keeps the first keys of a sequence.
After enable() all four are `attention` below: in every dtype that we serve, and with every mask.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flash_attn import flash_attn_func, flash_attn_interface
from flash_attn._errors import InvalidArgument, NotServed
from flash_attn.integrations._attend import as_bias, attend
from flash_attn.integrations._row_mask import row_mask

BACKENDS = ("flash", "flash_varlen", "_flash_3", "_flash_varlen_3")
GATES = ("_CAN_USE_FLASH_ATTN", "_CAN_USE_FLASH_ATTN_3")
# What the dispatcher's own "flash" calls where attention is spread over several processes.
FUNCTIONS = ("_wrapped_flash_attn_forward", "_wrapped_flash_attn_backward")

_own: dict = {}  # what enable() replaced: name -> value


def enable() -> tuple[str, ...]:
    """From now on diffusers' flash backends are ours, in the whole process. -> their names."""
    try:
        from diffusers.models import attention_dispatch as dispatch
    except ImportError as error:
        raise ImportError("needs diffusers 0.35 or newer, which has an attention dispatcher") from error
    if _own:
        return BACKENDS
    registry = dispatch._AttentionBackendRegistry
    for name in (*GATES, *FUNCTIONS):
        _own[name] = getattr(dispatch, name)
    for backend in _backends(dispatch):
        _own[backend] = registry._backends[backend], registry._constraints[backend]
    for name in GATES:
        setattr(dispatch, name, True)
    for name in FUNCTIONS:
        setattr(dispatch, name, getattr(flash_attn_interface, name))
    for backend in _backends(dispatch):
        _register(dispatch, backend, _attention_of(backend), [dispatch._check_device, dispatch._check_shape])
    return tuple(backend.value for backend in _backends(dispatch))


def disable() -> None:
    """diffusers' own again."""
    if not _own:
        return
    from diffusers.models import attention_dispatch as dispatch

    for name in (*GATES, *FUNCTIONS):
        setattr(dispatch, name, _own.pop(name))
    for backend in _backends(dispatch):
        _register(dispatch, backend, *_own.pop(backend))


def _backends(dispatch) -> list:
    return [x for x in dispatch.AttentionBackendName if x.value in BACKENDS]


def _register(dispatch, backend, function, constraints: list) -> None:
    spread = backend.value in dispatch._AttentionBackendRegistry._supports_context_parallel
    dispatch._AttentionBackendRegistry.register(backend, constraints, spread)(function)


def _attention_of(backend):
    """`attention` with what a backend has of its own: how it goes over several processes, where lse has its heads."""
    spread, heads_last = _own[backend][0], backend.value == "_flash_3"

    def function(
        query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False,
        window_size=(-1, -1), return_lse=False, _parallel_config=None,
    ):  # fmt: skip
        arguments = dict(attn_mask=attn_mask, is_causal=is_causal, scale=scale, return_lse=return_lse)
        if _parallel_config is not None:
            if backend.value != "flash":
                raise NotServed(f"{backend.value}: over several processes only 'flash' is served")
            arguments |= dict(dropout_p=dropout_p, window_size=window_size, _parallel_config=_parallel_config)
            return spread(query, key, value, **arguments)
        out = attention(query, key, value, dropout_p=dropout_p, window_size=window_size, **arguments)
        return (out[0], out[1].transpose(1, 2)) if return_lse and heads_last else out

    return function


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """query (batch, seqlen_q, nheads, headdim), key and value (batch, seqlen_k, nheads_k, ...), where nheads_k divides
    nheads -> (batch, seqlen_q, nheads, headdim_v); with return_lse also softmax_lse (batch, nheads, seqlen_q) fp32.

    attn_mask: bool (True where a key is seen) or added to the scores; (batch, seqlen_k), (batch, seqlen_q, seqlen_k) or
        what broadcasts to (batch, nheads, seqlen_q, seqlen_k). Keys that no query of a sequence sees are left out where
        those that remain are neighbours; no mask is made of seqlen_q x seqlen_k elements but yours.
    is_causal, window_size: as in flash_attn_func, the last query at the last key.
    """
    arguments = dict(dropout_p=dropout_p, softmax_scale=scale)
    window = dict(causal=is_causal, window_size=window_size)
    bias = padding = None
    if attn_mask is not None:
        mask = _four_dimensions(attn_mask, query, key)
        of_keys = mask.dtype == torch.bool and mask.shape[1] == mask.shape[2] == 1
        unbounded = not is_causal and tuple(window_size) == (-1, -1)
        if of_keys and unbounded and not return_lse and not torch.compiler.is_compiling():
            padding = mask[:, 0, 0].expand(query.shape[0], -1)
        else:
            bias = (as_bias(mask, query.dtype) if mask.dtype == torch.bool else mask).expand(-1, -1, -1, key.shape[1])
    if padding is not None:
        shape = query.shape[0], query.shape[1], key.shape[1]
        rows = row_mask(shape, query.device, padding_mask=padding, shift=key.shape[1] - query.shape[1])
        arguments |= dict(softcap=0.0, learnable_sink=None, deterministic=torch.are_deterministic_algorithms_enabled())
        return attend(query, key, value, rows, arguments)
    arguments |= dict(window, attn_bias=bias, deterministic=torch.are_deterministic_algorithms_enabled())
    out = flash_attn_func(query, key, value, return_attn_probs=return_lse, **arguments)
    return out[:2] if return_lse else out


def _four_dimensions(mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """-> (batch|1, nheads|1, seqlen_q|1, seqlen_k|1)."""
    batch, seqlen_q, nheads, _ = query.shape
    seqlen_k = key.shape[1]
    if mask.shape == (batch, seqlen_k):
        mask = mask[:, None, None, :]
    elif mask.dim() == 3:
        mask = mask[:, None]
    elif mask.dim() < 3:
        mask = mask.reshape((1,) * (4 - mask.dim()) + mask.shape)
    full = (batch, nheads, seqlen_q, seqlen_k)
    if mask.dim() != 4 or any(m not in (1, n) for m, n in zip(mask.shape, full, strict=True)):
        raise InvalidArgument(f"attn_mask: expected what broadcasts to {full}, got {tuple(mask.shape)}")
    return mask
