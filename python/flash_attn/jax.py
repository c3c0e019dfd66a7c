"""Attention for JAX, with gradient, under jit, grad, vmap and remat, on the CPU; on a GPU eager calls without gradient.

XLA calls the core from inside its compiled programs through jax.ffi: it works on XLA's own buffers, without a copy
(unless XLA keeps an operand in another layout than row-major), without Python and without a callback.

flash_attn.attention takes JAX arrays to the same place; this function takes NumPy arrays there too.
"""

from __future__ import annotations

import inspect

from flash_attn import _arrays
from flash_attn._arrays_jax import as_jax

__all__ = ["attention"]


def attention(q, k, v, **options):
    """flash_attn.attention of jax.Arrays (NumPy arrays become some), with its keywords but for `out`.

    Gradients: of q, k, v, bias and sink, reverse mode, once. Numbers (softmax_scale, window_size, ...) and the backend
    of flash_attn.use_backend are constants of the traced program. vmap makes one call of the joined batches where only
    q, k and v are mapped and sequences are of fixed length; else one call after the other.

    Raises as flash_attn.attention does, while the program is traced. What tables hold is checked when it runs: then
    jax.errors.JaxRuntimeError carries the words.
    """
    if "out" in options:
        raise TypeError("out: JAX arrays cannot be written")
    return _arrays.attention(as_jax(q, "q"), as_jax(k, "k"), as_jax(v, "v"), **options)


_signature = inspect.signature(_arrays.attention)
attention.__signature__ = _signature.replace(parameters=[p for n, p in _signature.parameters.items() if n != "out"])
