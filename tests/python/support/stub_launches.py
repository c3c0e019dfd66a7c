"""Launches without a GPU: what Triton's launcher would pass to the driver, and what the core passes of a recording.

The kernels' signatures are Triton's own (its binder specialises the arguments), and the order and C types of what
reaches the driver are read from the C code of the launcher that Triton generates. Nothing is compiled.
"""

from __future__ import annotations

import ctypes
import functools
import re
from types import SimpleNamespace

import torch
from flash_attn import _C
from flash_attn._engines.triton import backward, forward, launch
from flash_attn._engines.triton.device import Device
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

DEVICE = Device("cuda-90", 232448, 132, 50 << 20)
KERNELS = (forward.FORWARD, forward.COMBINE, forward.APPEND, backward.DQ, backward.DKDV, backward.DBIAS, backward.DSINK)
_SIZES = {"CUdeviceptr": 8, "int32_t": 4, "uint32_t": 4, "int64_t": 8}


@functools.cache
def passed(signature: tuple) -> list[tuple[int, str]]:
    """(argument, its C type) in the order in which Triton's launcher gives them to the driver, before the scratch."""
    code = driver.make_launcher({}, dict(enumerate(signature)), None)
    names = re.search(r"void \*params\[\] = \{ (.*?) \};", code).group(1).split(", ")
    assert names[-2:] == ["&global_scratch", "&profile_scratch"]
    declared = re.search(r"static void _launch\((.*?)\) \{", code).group(1).split(", ")
    types = {name: c_type for c_type, name in (x.split() for x in declared)}
    return [(int(n.removeprefix("&arg")), types[n.removeprefix("&")]) for n in names[:-2]]


def bits(x, c_type: str, kind: str, workspace: dict) -> object:
    """The first bytes of a parameter as an unsigned number; memory of no tensor as ("workspace", offset)."""
    if c_type == "CUdeviceptr":
        if x is None:
            return 0
        return workspace.get(id(x), x.data_ptr())
    number = ctypes.c_float(x) if kind in ("fp32", "f32") else getattr(ctypes, "c_" + c_type.removesuffix("_t"))(x)
    assert ctypes.sizeof(number) == _SIZES[c_type]
    return int.from_bytes(bytes(number), "little")


class Compiled:
    """A kernel that Triton has compiled, for all that is asked of it; notes what it is launched with."""

    handles = 1000

    def __init__(self, signature: dict, warps: int, launches: list):
        Compiled.handles += 1
        self.function, self.launches = Compiled.handles, launches
        self.src = SimpleNamespace(signature=signature)
        self.metadata = SimpleNamespace(num_warps=warps, num_ctas=1, shared=self.function * 16)
        self.packed_metadata = (warps, 1, self.metadata.shared)
        self.run = _Run(self._note)

    def _note(self, x, y, z, stream, function, packed, metadata, enter, leave, *arguments):
        assert (y, z, function) == (1, 1, self.function)
        self.launches.append((self, x, stream, arguments))


class _Run:
    """Triton's launcher."""

    global_scratch_size = profile_scratch_size = launch_cooperative_grid = launch_pdl = 0

    def __init__(self, note):
        self._note = note

    def __call__(self, *arguments):
        self._note(*arguments)


class Triton:
    """Takes the place of Triton's compiler and of the driver, while `monkeypatch` lasts."""

    def __init__(self, monkeypatch):
        self.by_python, self.by_core = [], []
        self.backend = make_backend(GPUTarget("cuda", 90, 32))
        monkeypatch.setattr(launch.Kernel, "jit", lambda kernel, aligned: _Jit(self, kernel, aligned))
        monkeypatch.setattr("flash_attn._engines.triton.device_of", lambda kind, index: DEVICE)
        for kernel in KERNELS:
            monkeypatch.setattr(kernel, "_compiled", {})
        forward._calls.clear()
        backward._calls.clear()
        _C.launch_by(lambda *launched: self.by_core.append(launched))

    @staticmethod
    def close():
        _C.launch_by(None)
        forward._calls.clear()
        backward._calls.clear()

    def parameters(self, t) -> list:
        """What Triton's launcher was given since this was asked last, as the driver would get it: (function, programs,
        threads, shared, stream, values). `t`: the tensors by name; all others are workspace, one behind the other."""
        named = {id(x) for x in t.values()}
        workspace, end, result = {}, 0, []
        for compiled, programs, stream, arguments in self.by_python:
            for x in arguments:
                if isinstance(x, torch.Tensor) and id(x) not in named and id(x) not in workspace:
                    workspace[id(x)] = "workspace", end
                    end += x.numel() * x.element_size()
            kinds = tuple(compiled.src.signature.values())
            values = [bits(arguments[i], c_type, kinds[i], workspace) for i, c_type in passed(kinds)]
            metadata = compiled.metadata
            if programs:
                result.append(
                    (compiled.function, programs, 32 * metadata.num_warps, metadata.shared, stream, [*values, 0, 0])
                )
        self.by_python.clear()
        return result

    def launched(self, workspace: tuple[int, int]) -> list:
        """What the core has launched since this was asked last. `workspace`: address and bytes of that call's."""
        address, size = workspace

        def seen(value):
            return ("workspace", value - address) if 0 <= value - address < size else value

        result = [(*call[:5], [seen(value) for value in call[5]]) for call in self.by_core]
        self.by_core.clear()
        return result


class _Jit:
    """kernel.jit(aligned)[grid](...), as far as the signature."""

    def __init__(self, triton: Triton, kernel, aligned: bool):
        self.triton = triton
        self.jit = kernel._aligned if aligned else kernel._unaligned

    def __getitem__(self, grid):
        def run(*arguments, num_warps, num_stages):
            binder = create_function_from_signature(self.jit.signature, self.jit.params, self.triton.backend)
            _, specialization, _ = binder(*arguments)
            names = [p.name for p in self.jit.params]
            signature = dict(zip(names, (kind for kind, _ in specialization), strict=True))
            return Compiled(signature, num_warps, self.triton.by_python)

        return run
