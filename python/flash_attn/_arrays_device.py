"""attention of arrays on a device, of CuPy say: torch's views of the same memory.

The engines of devices are written in PyTorch and Triton, and run on torch's current stream. DLPack's exchange orders
the two packages' streams: torch's waits for the arrays, the caller's for the results.
"""

from __future__ import annotations

from flash_attn._arrays_cpu import converted, namespace
from flash_attn._errors import InvalidType, NotServed


def _engine():
    try:
        from flash_attn import _arrays_torch
    except ModuleNotFoundError as e:
        if e.name != "torch":
            raise
        raise NotServed(
            "q: arrays on a device are served by engines written in PyTorch, which is not installed; "
            "pip install 'torch>=2.4' with support for the device, or pass arrays of the CPU"
        ) from None
    return _arrays_torch


def _view(x, name: str):
    import torch

    if isinstance(x, torch.Tensor):
        raise InvalidType(f"{name}: expected an array of the kind of q, got a torch.Tensor")
    if not hasattr(x, "__dlpack__"):
        raise InvalidType(f"{name}: expected an array with __dlpack__, got {type(x).__name__}")
    return torch.from_dlpack(x)


def _views(**arrays) -> list:
    return [None if x is None else _view(x, name) for name, x in arrays.items()]


def _back(x, like):
    return None if x is None else namespace(like).from_dlpack(x)


def attention(q, k, v, sequences, scores, return_lse, out):
    engine = _engine()
    tensors = _views(q=q, k=k, v=v, out=out)
    results = engine.attention(*tensors[:3], *converted(sequences, scores, _view), True, tensors[3])
    result, lse = (_back(x, q) for x in results)  # of a given out too: the caller's stream waits for it
    out = result if out is None else out
    return (out, lse) if return_lse else out


def attention_backward(dout, q, k, v, out, lse, dlse, sequences, scores, wants_dbias):
    """-> dq, dk, dv, dbias or None, dsink or None."""
    engine = _engine()
    tensors = _views(dout=dout, q=q, k=k, v=v, out=out, softmax_lse=lse, dlse=dlse)
    results = engine.attention_backward(*tensors, *converted(sequences, scores, _view), wants_dbias)
    return tuple(_back(x, q) for x in results)
