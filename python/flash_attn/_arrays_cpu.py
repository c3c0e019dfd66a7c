"""attention of arrays in the CPU's memory: the core reads and writes them where they lie."""

from __future__ import annotations

import sys

from flash_attn import _C
from flash_attn._backend import current
from flash_attn._call import FIXED, Run, Scores, Sequences
from flash_attn._dlpack import exportable
from flash_attn._errors import InvalidArgument, InvalidType

TABLES = ("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k", "block_table")  # arrays of Sequences
OF_SCORES = ("alibi_slopes", "learnable_sink", "attn_bias")  # arrays of Scores


def is_a(x, module: str, kind: str) -> bool:
    """Whether x is of a package's class. The package may not be there: who has such an object has imported it."""
    package = sys.modules.get(module)
    return package is not None and isinstance(x, getattr(package, kind, ()))


def on_a_device(x) -> bool:
    if is_a(x, "numpy", "ndarray"):
        return False
    if not hasattr(x, "__dlpack__") or not hasattr(x, "__dlpack_device__"):
        raise InvalidType(f"q: expected an array with __dlpack__, got {type(x).__name__}")
    return x.__dlpack_device__()[0] != 1


def converted(sequences: Sequences, scores: Scores, convert) -> tuple[Sequences, Scores]:
    """The groups with their arrays converted, by convert(array, name)."""
    if sequences is not FIXED:
        tables = {name: getattr(sequences, name) for name in TABLES}
        sequences = sequences._replace(**{n: convert(x, n) for n, x in tables.items() if x is not None})
    arrays = {name: x for name in OF_SCORES if (x := getattr(scores, name)) is not None}
    if arrays:
        scores = scores._replace(**{name: convert(x, name) for name, x in arrays.items()})
    return sequences, scores


def readable(x, name: str):
    """What the core can read of an array; None stays None."""
    if is_a(x, "torch", "Tensor"):
        raise InvalidType(f"{name}: expected an array of the kind of q, got a torch.Tensor")
    if not is_a(x, "numpy", "ndarray"):
        return x
    if isinstance(x, sys.modules["numpy"].ma.MaskedArray):
        raise InvalidType(f"{name}: a masked array's mask would be ignored; pass its data, and the mask as a bias")
    return exportable(x)


def namespace(x):
    """The functions of an array's package: by the array API's standard, or the package itself (CuPy)."""
    if hasattr(x, "__array_namespace__"):
        return x.__array_namespace__()
    package = sys.modules[type(x).__module__.partition(".")[0]]
    if not hasattr(package, "empty"):
        raise InvalidType(f"q: expected an array with __array_namespace__, got {type(x).__name__}")
    return package


def _empty(like, shape: tuple, float32: bool = False):
    """Memory in the kind of `like`, of its dtype or of float32."""
    if is_a(like, "numpy", "ndarray"):
        return sys.modules["numpy"].empty(shape, "float32" if float32 else like.dtype)
    xp = namespace(like)
    return xp.empty(shape, dtype=xp.float32 if float32 else like.dtype)


# Malformed ranks get some shape too: the core says what is wrong.
def out_shape(q, v) -> tuple:
    return tuple(q.shape) if len(v.shape) == 0 or len(q.shape) == 0 else (*q.shape[:-1], v.shape[-1])


def lse_shape(q) -> tuple:
    if len(q.shape) == 4:
        return q.shape[0], q.shape[2], q.shape[1]
    return (q.shape[1], q.shape[0]) if len(q.shape) == 3 else (0,)


def attention(q, k, v, sequences, scores, return_lse, out):
    arrays = readable(q, "q"), readable(k, "k"), readable(v, "v")
    for x, name in ((k, "k"), (v, "v")):
        if not hasattr(x, "shape"):
            raise InvalidType(f"{name}: expected an array, got {type(x).__name__}")
    if out is None:
        out = _empty(q, out_shape(q, v))
    elif is_a(out, "numpy", "ndarray") and not out.flags.writeable:
        raise InvalidArgument("out: expected memory that may be written, got a read-only array")
    lse = _empty(q, lse_shape(q), float32=True) if return_lse else None
    sequences, scores = converted(sequences, scores, readable)
    run = Run(current(), None, False, False, False)
    call = (*arrays, readable(out, "out"), lse, sequences, scores, None, run)
    if type(_C.forward(*call)) is not str:
        _run_hosted("forward", call)
    return (out, lse) if return_lse else out


def attention_backward(dout, q, k, v, out, lse, dlse, sequences, scores, wants_dbias):
    """-> dq, dk, dv, dbias or None, dsink or None."""
    names = ("dout", "q", "k", "v", "out", "softmax_lse")
    inputs = [readable(x, name) for x, name in zip((dout, q, k, v, out, lse), names, strict=True)]
    results = [_empty(x, tuple(x.shape)) for x in (q, k, v)]
    bias, sink = scores.attn_bias, scores.learnable_sink
    dbias = _empty(bias, tuple(bias.shape), float32=True) if wants_dbias else None  # sums: in fp32
    dsink = _empty(sink, tuple(sink.shape), float32=True) if sink is not None else None
    sequences, scores = converted(sequences, scores, readable)
    written = [readable(x, name) for x, name in zip(results, ("dq", "dk", "dv"), strict=True)]
    run = Run(current(), None, False, False, False)
    call = (*inputs, *written, readable(dlse, "dlse"), dbias, dsink, sequences, scores, None, run)
    if type(_C.backward(*call)) is not str:
        _run_hosted("backward", call)
    return (*results, *(None if d is None else _cast(d, x) for d, x in ((dbias, bias), (dsink, sink))))


def _cast(x, like):
    if is_a(x, "numpy", "ndarray"):
        return x.astype(like.dtype, copy=False)
    xp = namespace(x)
    return xp.astype(x, like.dtype) if hasattr(xp, "astype") else x.astype(like.dtype)


def _run_hosted(which: str, call: tuple) -> None:
    """An engine written in PyTorch was chosen: it runs on torch's views of the same memory."""
    import torch

    from flash_attn import _run

    def view(x, name=""):
        return torch.from_dlpack(x) if hasattr(x, "__dlpack__") else x

    *tensors, sequences, scores, dropout, run = call
    with torch.no_grad():
        getattr(_run, which)(*map(view, tensors), *converted(sequences, scores, view), dropout, run)
