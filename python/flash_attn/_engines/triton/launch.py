"""The way from Python to a compiled kernel, as short as can be.

`kernel[grid](...)` binds, specialises and hashes every argument of every call: 20-47 us for 20-52 arguments. Here a
kernel is compiled through it once per key and device, and called directly from then on: 5-9 us. The key must therefore
say everything that decides the machine code: the constexprs, which tensors are there and their dtypes, and whether
pointers are aligned (one bit for all of q, k, v and so on; other tensors are never assumed to be).
"""

from __future__ import annotations

import triton
from triton.runtime import errors

from flash_attn._engines.triton import configs

# What compilers say where a tile takes more shared memory or registers than there are.
_TOO_LARGE = tuple(getattr(errors, n) for n in ("OutOfResources", "PTXASError") if hasattr(errors, n))

# Versions whose CompiledKernel.run was tried as it is called below; its arguments changed between most of them.
DIRECT_VERSIONS = ("3.6",)
_DIRECT = triton.__version__.rsplit(".", 1)[0] in DIRECT_VERSIONS


def is_of_the_tile(error: Exception) -> bool:
    """Whether a smaller tile may compile: this one was too large, or one of the compiler's passes failed on it."""
    return isinstance(error, _TOO_LARGE) or (type(error) is RuntimeError and "PassManager::run failed" in str(error))


class Again(Exception):
    """A tile did not compile, and a smaller one has taken its place: plan and launch once more."""


class Call:
    """One launch but for its tensors: what follows from shapes, strides and numbers, and is kept from call to call."""

    __slots__ = ("aligned", "choice", "compiled", "constants", "key", "numbers", "programs", "stages", "step", "warps")

    def __init__(self, programs: int, numbers: tuple, constants: tuple, key, aligned: bool, tile, choice=None):
        """`numbers`: arguments behind the tensors; `constants`: the constexprs, which come last; `choice`: of tile."""
        self.programs, self.numbers, self.constants = programs, numbers, constants
        self.key, self.aligned, self.choice = key, aligned, choice
        self.warps, self.stages = tile
        self.compiled = None
        self.step = None  # what recording.py makes of it


class Kernel:
    """A Triton function, and its compiled forms. `aligned`: names of the pointers whose alignment the key tells."""

    def __init__(self, function, aligned: tuple[str, ...]):
        function = getattr(function, "fn", function)
        names = function.__code__.co_varnames[: function.__code__.co_argcount]
        constant = [n for n in names if "constexpr" in str(function.__annotations__.get(n, ""))]
        runtime = [n for n in names if n not in constant]
        self.name = function.__name__
        self.names = names
        pointers = runtime[: next(i for i, n in enumerate(runtime) if n.endswith("_b") or n == "batch")]
        rest = runtime[len(pointers) :]
        self._aligned = triton.jit(
            function,
            do_not_specialize=rest,
            do_not_specialize_on_alignment=[n for n in pointers if n not in aligned],
        )
        self._unaligned = triton.jit(function, do_not_specialize=rest, do_not_specialize_on_alignment=pointers)
        self._compiled = {}

    def jit(self, is_aligned: bool):
        return self._aligned if is_aligned else self._unaligned

    def __call__(self, call: Call, device: int, stream: int, tensors: tuple) -> None:
        compiled = call.compiled
        if compiled is not None:
            compiled.run(
                call.programs, 1, 1, stream, compiled.function, compiled.packed_metadata, None, None, None,
                *tensors, *call.numbers, *call.constants,
            )  # fmt: skip
        elif call.programs:
            self._first(call, device, stream, tensors)

    def _first(self, call: Call, device: int, stream: int, tensors: tuple) -> None:
        compiled = self._compiled.get((call.key, call.constants, call.warps, call.stages, call.aligned, device))
        if compiled is not None:
            call.compiled = compiled
            return self(call, device, stream, tensors)
        arguments = (*tensors, *call.numbers, *call.constants)
        try:
            compiled = self.jit(call.aligned)[(call.programs,)](
                *arguments, num_warps=call.warps, num_stages=call.stages
            )
        except (*_TOO_LARGE, RuntimeError) as error:
            if not is_of_the_tile(error) or call.choice is None or not configs.try_smaller(call.choice):
                raise
            raise Again from error
        if _DIRECT and hasattr(compiled, "packed_metadata"):
            self._compiled[call.key, call.constants, call.warps, call.stages, call.aligned, device] = compiled
            call.compiled = compiled


class Calls:
    """Calls by what they follow from. Forgets all when there are many, as a length in the key may grow step by step."""

    def __init__(self, most: int = 4096):
        self._most, self._calls = most, {}
        self.get = self._calls.get

    def add(self, key, calls):
        if len(self._calls) >= self._most:
            self._calls.clear()
        self._calls[key] = calls
        return calls

    def clear(self) -> None:
        self._calls.clear()


def layout(tensors) -> tuple:
    """For the key of Calls: shapes, strides and dtypes of optional tensors."""
    return tuple(None if x is None else (x.shape, x.stride(), x.dtype) for x in tensors)
