"""attention of JAX arrays: a call that XLA makes from inside its compiled programs, with its gradient.

The core's handlers (python/bindings/xla_handlers.cpp) are registered with jax.ffi for the CPU. They read and write
XLA's own buffers: no copy, no Python, no callback. Shapes and dtypes are checked when a program is traced, contents of
tables when it runs.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import numpy as np
from jax import numpy as jnp

from flash_attn import _C
from flash_attn._arrays_cpu import OF_SCORES, TABLES, is_a, lse_shape, out_shape
from flash_attn._backend import current
from flash_attn._call import Run, Scores, Sequences
from flash_attn._dlpack import CODES, stand_in
from flash_attn._errors import InvalidArgument, InvalidType, NotServed

if not hasattr(jax, "ffi"):
    raise ImportError(f"flash_attn.jax needs jax >= 0.5, which has jax.ffi; this is jax {jax.__version__}")

for _target, _handler in _C.xla_handlers().items():
    jax.ffi.register_ffi_target(_target, _handler, platform="cpu")


class _Settings(NamedTuple):
    """All of a call that is no array: constants of the compiled program."""

    max_seqlen_q: int | None
    max_seqlen_k: int | None
    softmax_scale: float | None
    causal: bool
    window_left: int
    window_right: int
    softcap: float
    attention_chunk: int
    backend: str | None

    def attributes(self) -> dict:
        kinds = (np.int64, np.int64, np.float64, np.bool_, np.int64, np.int64, np.float64, np.int64, str)
        return {n: kind(x) for n, kind, x in zip(self._fields, kinds, self, strict=True) if x is not None}

    def groups(self, arrays: dict) -> tuple[Sequences, Scores]:
        sequences = Sequences(max_seqlen_q=self.max_seqlen_q, max_seqlen_k=self.max_seqlen_k)
        sequences = sequences._replace(**{name: arrays[name] for name in TABLES if name in arrays})
        scores = Scores(*self[2:7], attention_chunk=self.attention_chunk)
        names = zip(OF_SCORES, ("alibi_slopes", "sink", "bias"), strict=True)
        return sequences, scores._replace(**{ours: arrays[name] for ours, name in names if name in arrays})


# ---- one call of a handler ------------------------------------------------------------------------------------------

_OF_ENTRIES = frozenset(("q", "k", "v", "out", "lse", "dout", "dlse", "dq", "dk", "dv"))  # one for each batch entry


def _call(target: str, settings: _Settings, operands: dict, results: dict) -> dict:
    """`operands`: arrays by the handler's names; `results`: shapes and dtypes by name. -> the results by name."""
    names = tuple(operands)

    @jax.custom_batching.custom_vmap
    def run(*arrays):
        call = jax.ffi.ffi_call(target, tuple(results.values()), vmap_method="sequential")
        words = {"operands": " ".join(names), "results": " ".join(results)}
        return tuple(call(*arrays, **words, **settings.attributes()))

    @run.def_vmap
    def _run_batched(n, batched, *arrays):
        if _may_join(names, batched, arrays, results):
            arrays = {
                name: _joined(x if has else jnp.broadcast_to(x, (n, *x.shape))) if name in _OF_ENTRIES else x
                for name, has, x in zip(names, batched, arrays, strict=True)
            }
            more = {name: jax.ShapeDtypeStruct((n * x.shape[0], *x.shape[1:]), x.dtype) for name, x in results.items()}
            written = _call(target, settings, arrays, more)
            values = tuple(x.reshape(n, -1, *x.shape[1:]) for x in written.values())
        else:

            def one(mine):
                mine = iter(mine)
                return run(*(next(mine) if has else x for has, x in zip(batched, arrays, strict=True)))

            values = jax.lax.map(one, [x for has, x in zip(batched, arrays, strict=True) if has])
        return values, (True,) * len(values)

    return dict(zip(results, run(*operands.values()), strict=True))


def _joined(x):
    return x.reshape(-1, *x.shape[2:])


def _may_join(names, batched, arrays, results) -> bool:
    """Whether vmap's axis may become part of the batch: one call instead of one after the other."""
    for name, has, x in zip(names, batched, arrays, strict=True):
        if name in _OF_ENTRIES:
            if math.prod(x.shape) == 0:
                return False
        elif has or not _is_of_all_entries(name, x):
            return False
    return _OF_ENTRIES.issuperset(results)


def _is_of_all_entries(name: str, x) -> bool:
    return name == "sink" or (name == "bias" and x.shape[0] == 1) or (name == "alibi_slopes" and x.ndim == 1)


def _check(check, arrays: dict, results: dict, order: tuple, settings: _Settings) -> None:
    """The core's own checks of shapes and dtypes, now: tables stand as zeros, which all may hold."""
    stand_ins = {}
    for name, x in (arrays | results).items():
        dtype = np.dtype(x.dtype)
        if name in TABLES:
            stand_ins[name] = np.zeros(x.shape, dtype)
        elif str(dtype) not in CODES:
            raise InvalidType(f"{name}: expected float16, bfloat16, float32 or float64, got {dtype}")
        else:
            stand_ins[name] = stand_in(dtype, x.shape)
    run = Run(settings.backend, None, False, False, False)
    check(*(stand_ins.get(name) for name in order), *settings.groups(stand_ins), None, run)


def _forward(settings: _Settings, wants_lse: bool, arrays: dict) -> dict:
    q, v = arrays["q"], arrays["v"]
    results = {"out": jax.ShapeDtypeStruct(out_shape(q, v), q.dtype)}
    if wants_lse:
        results["lse"] = jax.ShapeDtypeStruct(lse_shape(q), jnp.float32)
    _check(_C.check_forward, arrays, results, ("q", "k", "v", "out", "lse"), settings)
    return _call("flash_attn_forward", settings, arrays, results)


_ORDER_OF_BACKWARD = tuple("dout q k v out lse dq dk dv dlse dbias dsink".split())


def _backward(settings: _Settings, arrays: dict, wants_dbias: bool, wants_dsink: bool) -> tuple:
    """-> dq, dk, dv, dbias or None, dsink or None."""
    results = {"d" + name: jax.ShapeDtypeStruct(arrays[name].shape, arrays[name].dtype) for name in "qkv"}
    for name, wanted in (("bias", wants_dbias), ("sink", wants_dsink)):
        if wanted:
            results["d" + name] = jax.ShapeDtypeStruct(arrays[name].shape, jnp.float32)  # sums
    _check(_C.check_backward, arrays, results, _ORDER_OF_BACKWARD, settings)
    written = _call("flash_attn_backward", settings, arrays, results)
    of_scores = (written["d" + x].astype(arrays[x].dtype) if "d" + x in written else None for x in ("bias", "sink"))
    return written["dq"], written["dk"], written["dv"], *of_scores


# ---- the gradient ---------------------------------------------------------------------------------------------------


def _present(**arrays) -> dict:
    return {name: x for name, x in arrays.items() if x is not None}


@functools.partial(jax.jit, static_argnums=(0, 1))
@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(settings, wants_lse, q, k, v, bias, sink, constants):
    """`constants`: arrays without a gradient, by name. -> (out,) or (out, lse)."""
    return tuple(_forward(settings, wants_lse, _present(q=q, k=k, v=v, bias=bias, sink=sink) | constants).values())


def _attention_fwd(settings, wants_lse, *arguments):
    differentiated = jax.tree.map(lambda x: x.perturbed, arguments)
    q, k, v, bias, sink, constants = jax.tree.map(lambda x: x.value, arguments)
    if differentiated[5].get("alibi_slopes"):
        raise InvalidArgument("alibi_slopes: has no gradient; pass jax.lax.stop_gradient(alibi_slopes)")
    if "block_table" in constants:
        raise NotServed("block_table: pages of keys and values are not differentiable")
    arrays = _present(q=q, k=k, v=v, bias=bias, sink=sink) | constants
    results = _forward(settings, True, arrays)
    wants = tuple(() if differentiated[i] else None for i in (3, 4))  # known without their values
    return tuple(results.values())[: 1 + wants_lse], (arrays | results, wants)


def _attention_bwd(settings, wants_lse, residuals, cotangents):
    arrays, wants = residuals
    dout, dlse = (*cotangents, None)[:2]
    if isinstance(dout, jax.custom_derivatives.SymbolicZero):
        dout = jnp.zeros(dout.shape, dout.dtype)
    if isinstance(dlse, jax.custom_derivatives.SymbolicZero):
        dlse = None
    return *_backward(settings, arrays | _present(dout=dout, dlse=dlse), *(w is not None for w in wants)), None


_attention.__wrapped__.defvjp(_attention_fwd, _attention_bwd, symbolic_zeros=True)
_gradients = jax.jit(_backward, static_argnums=(0, 2, 3))


# ---- as _arrays.py calls it -----------------------------------------------------------------------------------------


def _arrays_of(sequences: Sequences, scores: Scores, **arrays) -> dict:
    arrays |= {name: getattr(sequences, name) for name in TABLES}
    arrays |= {"alibi_slopes": scores.alibi_slopes, "sink": scores.learnable_sink, "bias": scores.attn_bias}
    arrays = {name: as_jax(x, name) for name, x in arrays.items() if x is not None}
    for name, x in arrays.items():
        if is_on_a_device(x):
            raise NotServed(
                f"{name}: a JAX array of a device is served in calls that nobody traces (no jit, grad, vmap), with all "
                "others there too; traced calls, and their gradients, are served on the CPU"
            )
    return arrays


def as_jax(x, name: str):
    if not isinstance(x, jax.Array):
        if not is_a(x, "numpy", "ndarray"):
            raise InvalidType(f"{name}: expected a jax.Array, got {type(x).__name__}")
        x = jnp.asarray(x)
    return x


def is_on_a_device(x) -> bool:
    """Of a traced array nobody knows: XLA says so when it compiles for a platform without our handlers."""
    if isinstance(x, jax.core.Tracer) or not isinstance(x, jax.Array):
        return False
    return any(device.platform != "cpu" for device in x.devices())


def _settings(sequences: Sequences, scores: Scores) -> _Settings:
    def number(kind, x):
        return None if x is None else kind(x)

    return _Settings(
        number(int, sequences.max_seqlen_q),
        number(int, sequences.max_seqlen_k),
        number(float, scores.softmax_scale),
        bool(scores.causal),
        int(scores.window_size_left),
        int(scores.window_size_right),
        float(scores.softcap),
        int(scores.attention_chunk),
        current(),
    )


def attention(q, k, v, sequences, scores, return_lse, out):
    if out is not None:
        raise InvalidArgument("out: JAX arrays cannot be written; leave it out")
    arrays = _arrays_of(sequences, scores, q=q, k=k, v=v)
    first = [arrays.pop(name, None) for name in ("q", "k", "v", "bias", "sink")]
    results = _attention(_settings(sequences, scores), bool(return_lse), *first, arrays)
    return results if return_lse else results[0]


def attention_backward(dout, q, k, v, out, lse, dlse, sequences, scores, wants_dbias):
    """-> dq, dk, dv, dbias or None, dsink or None."""
    arrays = _arrays_of(sequences, scores, dout=dout, q=q, k=k, v=v, out=out, lse=lse, dlse=dlse)
    return _gradients(_settings(sequences, scores), arrays, wants_dbias, scores.learnable_sink is not None)
