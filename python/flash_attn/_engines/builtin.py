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
        "needs": ("torch", "triton"),
    },
    # float64 where the device has it. Backends for the CPU stand before it.
    "torch": {
        "engine": "flash_attn._engines.torch:TorchEngine",
        "description": "PyTorch operations in blocks of keys: slow, on any device that torch runs on",
        "devices": ("cpu", "cuda", "xpu", "mps", "npu"),
        "dtypes": ("float16", "bfloat16", "float32", "float64"),
        "serves": _C.feature_names(),
        "backward": _C.feature_names(),
        "needs": ("torch",),
    },
    # Not automatic: see the docstring of _engines/flaggems. Vendors' devices from outside torch are "npu".
    "flaggems": {
        "engine": "flash_attn._engines.flaggems:FlagGemsEngine",
        "description": "FlagGems' packed attention in Triton, verified at first use; forward only, for who asks for it",
        "devices": ("cuda", "npu"),
        "dtypes": ("float16", "bfloat16"),
        "serves": (
            "packed_q",
            "packed_k",
            "pages",
            "seqused_k",
            "grouped",
            "causal",
            "window",
            "softcap",
            "alibi",
            "lse",
            "deterministic",
            "blind_rows",
        ),  # fmt: skip
        "max_headdim": 256,
        "headdim_multiple": 8,
        "needs": ("flag_gems", "triton"),
        "automatic": False,
        "words": {
            "seqused_q": "seqused_q: FlagGems has no used lengths of queries",
            "leftpad_k": "leftpad_k: not supported by FlagGems",
            "cache_batch_idx": "cache_batch_idx: FlagGems reads entry b of a cache for sequence b",
            "new_keys": "k: FlagGems appends no keys to a cache",
            "rotary": "rotary: FlagGems rotates nothing within attention",
            "own_headdim_v": "v: FlagGems needs the headdim of q",
            "chunk": "attention_chunk: not supported by FlagGems",
            "bias": "attn_bias: not supported by FlagGems",
            "sink": "learnable_sink: FlagGems accepts sinks and ignores them",
            "dropout": "dropout_p: FlagGems drops other entries than every other backend does for the same state",
            "strided_columns": "q, k, v, out: FlagGems needs the elements of a row side by side",
        },
    },
}
