"""The `torch` backend: attention as PyTorch operations in blocks of keys, on any device that torch runs on.

The last resort: slow, never wrong. It serves every feature, with memory linear in the sequence lengths. Nothing here
waits for the device: lengths that live there are masks over the bounds that the host knows, so every call can be
captured in a graph.
"""

from __future__ import annotations

import contextlib

import torch

from flash_attn._engines.torch.backward import backward
from flash_attn._engines.torch.blocks import block_sizes
from flash_attn._engines.torch.forward import forward


@contextlib.contextmanager
def _quiet(device: torch.device):
    """No autograd (the caller has its own), and no autocast: it would turn products of fp32 into 16 bits.

    Inference mode, as caches may have been made in it, and such tensors can be written nowhere else.
    """
    with torch.inference_mode():
        if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
            with torch.autocast(device.type, enabled=False):
                yield
        else:
            yield


class TorchEngine:
    def forward(self, p, t) -> None:
        with _quiet(t.q.device):
            forward(p, t)

    def backward(self, p, t) -> None:
        with _quiet(t.q.device):
            backward(p, t)

    def plan(self, p) -> str:
        b = block_sizes(p)
        sums = "float64" if p.dtype == "float64" else "float32"
        return (
            f"PyTorch operations on {b.batch} sequences x {b.rows} rows x {b.keys} keys at a time, all heads; "
            f"sums in {sums}"
        )
