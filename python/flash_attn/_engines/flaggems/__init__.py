"""The `flaggems` backend: FlagGems' packed attention, where a vendor brings a Triton and flag_gems.

It runs where it is asked for: FLASH_ATTENTION_BACKEND=flaggems, use_backend("flaggems"), or the older
FLASH_ATTENTION_USE_FLAGGEMS=TRUE. It is not chosen by itself: FlagGems' operators change from release to release and
from vendor to vendor, whereas `torch` serves the same devices, and is slow but never wrong. Where its speed is wanted
without a name in every program (a vendor's image, a training loop whose backward runs elsewhere), one line prefers it:

    from flash_attn._engines.builtin import BUILT_IN
    flash_attn.register_backend("flaggems", **{**BUILT_IN["flaggems"], "automatic": True, "before": "torch"})

Forward only. Gradients run on another backend if flaggems was preferred so, and are refused in words if it was named.

Nothing is believed. What was measured on a release, a vendor and a Triton is data (capabilities.py); every other
combination of features is compared with the `torch` engine when it is first used (verification.py), which takes a
compilation and a few milliseconds, and is refused if it is wrong.

FlagGems multiplies what it masks by 0, and where headdim is no power of two also what lies beside a row: a NaN in a key
or value may reach rows and heads that do not see it.
"""

from __future__ import annotations

import torch

from flash_attn._engines.flaggems import adapter
from flash_attn._engines.flaggems.capabilities import TRITON_BEFORE, is_measured, release
from flash_attn._engines.flaggems.verification import Signature, check, signature_of


class FlagGemsEngine:
    def __init__(self):
        import flag_gems  # hundreds of files; raises if there is no device
        import triton

        self.version, self.vendor, self.triton = flag_gems.__version__, flag_gems.vendor_name, triton.__version__
        before = TRITON_BEFORE.get(self.version)
        if before and release(self.triton) >= release(before):
            raise ImportError(
                f"flag_gems {self.version} needs triton < {before}, which removed block pointers; "
                f"{self.triton} is installed"
            )
        self._varlen = flag_gems.flash_attn_varlen_func
        self._device = torch.device(flag_gems.device)
        self._findings: dict[Signature, str] = {}  # "" if right

    def refuses(self, p) -> str:
        return adapter.refusal(p) or self._verify(signature_of(p))

    def forward(self, p, t) -> None:
        # Inference mode, as out may have been made in it, and such tensors can be written nowhere else.
        with torch.inference_mode():
            adapter.forward(self._varlen, p, t)

    def plan(self, p) -> str:
        keys = "pages" if adapter.reads_pages(p) else "packed rows"
        return (
            f"flash_attn_varlen_func of FlagGems {self.version} ({self.vendor}) on {keys}; tensors whose rows do not "
            "lie at one distance, and k and v of different strides, are copied first"
        )

    def _verify(self, s: Signature) -> str:
        if is_measured(self.version, self.triton, self.vendor, s):
            return ""
        if s not in self._findings:
            if _is_capturing(self._device):
                return f"{s}: not yet verified; run the call once before it is captured in a graph"
            self._findings[s] = check(self._varlen, s, self._device)
        wrong = self._findings[s]
        return wrong and f"{s}: FlagGems {self.version}: wrong here at first use: {wrong}"


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
