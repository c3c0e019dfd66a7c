"""Compiles what a Problem would launch, for a GPU that need not be there."""

from __future__ import annotations

import torch
import triton
from flash_attn._engines.triton import backward, forward, launch
from flash_attn._engines.triton.device import Device
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

_POINTERS = {
    torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip
# Shared memory that one program may have, in bytes.
SHARED = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}


def device_of(target: str) -> tuple[GPUTarget, Device]:
    """`target`: "90", "gfx942" ..."""
    if target.startswith("gfx"):
        warp = 64 if target.startswith("gfx9") else 32
        return GPUTarget("hip", target, warp), Device(f"hip-{target}", 65536, 104, 8 << 20)
    return GPUTarget("cuda", int(target), 32), Device(f"cuda-{target}", SHARED[int(target)], 132, 50 << 20)


class Compiler:
    """Takes the place of Kernel.__call__: compiles, and remembers what came out."""

    def __init__(self, target: GPUTarget):
        self.target, self.compiled = target, []

    def __call__(self, kernel, call, device, stream, tensors):
        function = kernel.jit(call.aligned)
        annotations = function.fn.__annotations__
        signature, constants, attributes = {}, {}, {}
        arguments = (*tensors, *call.numbers)
        for i, (name, x) in enumerate(zip(kernel.names, (*arguments, *call.constants), strict=True)):
            if i >= len(arguments) or x is None:
                signature[name], constants[(i,)] = "constexpr", x
            elif isinstance(x, torch.Tensor):
                signature[name] = _POINTERS[x.dtype]
                if call.aligned and name not in function.do_not_specialize_on_alignment:
                    attributes[(i,)] = [["tt.divisibility", 16]]
            elif name in annotations:
                signature[name] = annotations[name]
            else:
                signature[name] = "fp32" if isinstance(x, float) else "i32" if x < 2**31 else "i64"
        source = ASTSource(function, signature, constants, attributes)
        options = {"num_warps": call.warps, "num_stages": call.stages}
        self.compiled.append((kernel.name, triton.compile(source, target=self.target, options=options)))


def compile_problem(monkeypatch, target: str, p, t) -> list:
    """-> (name, CompiledKernel) of each launch, and the Device."""
    gpu, device = device_of(target)
    compiler = Compiler(gpu)
    monkeypatch.setattr(launch.Kernel, "__call__", lambda *a: compiler(*a))
    forward._calls.clear()
    backward._calls.clear()
    run = backward.run_backward if p.is_backward else forward.run_forward
    run(p, t, device, 0, triton.__version__)
    forward._calls.clear()
    backward._calls.clear()
    return compiler.compiled, device
