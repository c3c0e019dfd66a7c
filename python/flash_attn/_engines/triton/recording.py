"""Launches handed over to the core: it makes them again by itself, for every call of the same key (see
src/core/recordings.hpp), and Python no longer takes part.

A kernel takes its arguments in the order of its signature, constants left out, and behind them two pointers to scratch
memory. That is what Triton's own launcher passes (triton/backends/nvidia/driver.py); launch.DIRECT_VERSIONS says of
which versions that is known.
"""

from __future__ import annotations

import struct

_PACK = {
    kind: struct.Struct(form).pack
    for form, kinds in {
        "<b": ("i1", "i8"), "<h": ("i16",), "<i": ("i32",), "<q": ("i64",), "<B": ("u1", "u8"), "<H": ("u16",),
        "<I": ("u32",), "<Q": ("u64",), "<f": ("fp32", "f32"), "<d": ("fp64",),
    }.items()
    for kind in kinds
}  # fmt: skip
_NO_POINTER = bytes(8)


def recordable(p) -> bool:
    """Products in fp32 follow torch's switch for TF32 too, which the core does not see."""
    return p.recordable and p.dtype != "float32"


def record(p, launches, workspace_bytes: int = 0) -> None:
    """`launches`: (Call, tensors) in their order, of a call that has been launched. Tensors are named as in Tensors;
    ints are offsets in a workspace that the core asks torch for. Nothing is recorded unless everything can be."""
    steps = []
    for call, tensors in launches:
        if call.programs:
            if call.step is None:
                call.step = _step(call, tensors) or ()
            if not call.step:
                return
            steps.append(call.step)
    p.record(steps, workspace_bytes)


def _step(call, tensors: tuple):
    """-> function, programs, threads, bytes of shared memory, parameters; None: only Triton can launch it."""
    compiled = call.compiled
    if compiled is None:
        return None
    run, metadata = compiled.run, compiled.metadata
    extras = ("global_scratch_size", "profile_scratch_size", "launch_cooperative_grid", "launch_pdl")
    if any(getattr(run, name, 1) for name in extras) or metadata.num_ctas != 1:
        return None
    parameters = []
    arguments = (*tensors, *call.numbers, *call.constants)
    for kind, x in zip(compiled.src.signature.values(), arguments, strict=True):
        if kind == "constexpr":
            continue
        if kind[0] == "*":
            parameters.append(x)
        elif kind in _PACK:
            parameters.append(_PACK[kind](x))
        else:
            return None
    parameters += (_NO_POINTER, _NO_POINTER)
    return compiled.function, call.programs, metadata.num_warps * 32, metadata.shared, parameters
