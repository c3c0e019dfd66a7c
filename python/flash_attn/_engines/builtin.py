"""The engines that come with the package, as register_backend takes them, the preferred first. None is imported."""

from __future__ import annotations

from flash_attn import _C

BUILT_IN = {
    "triton": {
        "engine": "flash_attn._engines.triton:TritonEngine",
        "description": "our own Triton kernels, for GPUs that Triton serves",
        "devices": ("cuda", "xpu"),
        "dtypes": ("float16", "bfloat16", "float32"),
        "serves": _C.feature_names(),
        "backward": _C.feature_names(),
        "max_headdim": 512,
        "needs": ("triton",),
    },
    # float64 where the device has it. Backends for the CPU stand before it.
    "torch": {
        "engine": "flash_attn._engines.torch:TorchEngine",
        "description": "PyTorch operations in blocks of keys: slow, on any device that torch runs on",
        "devices": ("cpu", "cuda", "xpu", "mps", "npu"),
        "dtypes": ("float16", "bfloat16", "float32", "float64"),
        "serves": _C.feature_names(),
        "backward": _C.feature_names(),
    },
}
