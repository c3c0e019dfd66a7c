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


class Again(Exception):
    """A tile was too large, and a smaller one has taken its place: plan and launch once more."""


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
        self.pointers = pointers
        self._aligned = triton.jit(
            function,
            do_not_specialize=rest,
            do_not_specialize_on_alignment=[n for n in pointers if n not in aligned],
        )
        self._unaligned = triton.jit(function, do_not_specialize=rest, do_not_specialize_on_alignment=pointers)
        self._compiled = {}

    def jit(self, is_aligned: bool):
        return self._aligned if is_aligned else self._unaligned

    def __call__(self, key, is_aligned: bool, programs: int, device, stream: int, arguments, constants, warps, stages,
                 choice=None):  # fmt: skip
        """`constants`: the constexprs, in the order of the signature, where they come last. `choice`: of the tile."""
        compiled = self._compiled.get((key, device))
        if compiled is not None:
            compiled.run(
                programs, 1, 1, stream, compiled.function, compiled.packed_metadata, None, None, None,
                *arguments, *constants,
            )  # fmt: skip
            return
        try:
            compiled = self.jit(is_aligned)[(programs,)](*arguments, *constants, num_warps=warps, num_stages=stages)
        except _TOO_LARGE as error:
            if choice is None or not configs.try_smaller(choice):
                raise
            raise Again from error
        if _DIRECT and hasattr(compiled, "packed_metadata"):
            self._compiled[key, device] = compiled
