"""The same bits at every repeat with deterministic=True, forward and backward.

python tests/device/repeats.py [--device cuda] [--backend NAME] [--repeats 200] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import flash_attn
import torch

CASES = {
    "headdim 64": {"headdim": 64},
    "headdim 128, causal": {"headdim": 128, "causal": True},
    "headdim 256, causal": {"headdim": 256, "causal": True},
    "headdim 80, window, grouped": {"headdim": 80, "nheads_k": 2, "window_size": (100, 30)},
    "dropout": {"headdim": 64, "dropout_p": 0.2},
    "packed": {"headdim": 128, "causal": True, "packed": True},
    "fp32, softcap, sink": {"headdim": 64, "dtype": torch.float32, "softcap": 10.0, "learnable_sink": True},
    "one query of many keys": {"headdim": 128, "seqlen_q": 1, "nheads_k": 2, "seqlen_k": 9000},
}


def call(device, headdim, nheads_k=8, seqlen_q=700, seqlen_k=None, packed=False, dtype=torch.bfloat16,
         learnable_sink=False, **options):  # fmt: skip
    """-> a function that returns out and the gradients."""
    g = torch.Generator().manual_seed(1)
    seqlen_k = seqlen_k or seqlen_q
    rows = [(3 * seqlen_q,), (3 * seqlen_k,)] if packed else [(3, seqlen_q), (3, seqlen_k)]
    shapes = [(*rows[i], h, headdim) for i, h in ((0, 8), (1, nheads_k), (1, nheads_k))]
    q, k, v = (torch.randn(s, generator=g).to(device, dtype).requires_grad_() for s in shapes)
    leaves = [q, k, v]
    if learnable_sink:
        options["learnable_sink"] = torch.randn(8, generator=g).to(device).requires_grad_()
        leaves.append(options["learnable_sink"])
    arguments, function = (), flash_attn.flash_attn_func
    if packed:
        cu = torch.tensor([0, 50, 50, 3 * seqlen_q], dtype=torch.int32, device=device)
        arguments, function = (cu, cu, 3 * seqlen_q, 3 * seqlen_q), flash_attn.flash_attn_varlen_func

    def once():
        torch.manual_seed(5)
        out = function(q, k, v, *arguments, deterministic=True, **options)
        return [out, *torch.autograd.grad(out, leaves, torch.ones_like(out))]

    return once


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backend")
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    differing = {}
    with flash_attn.use_backend(args.backend):
        for name, options in CASES.items():
            once = call(args.device, **options)
            first = once()
            equal = sum(all(map(torch.equal, once(), first)) for _ in range(args.repeats))
            differing[name] = args.repeats - equal
            print(f"{name}: {equal} of {args.repeats} repeats bit-equal", flush=True)
    if args.json:
        record = {"name": "repeats", "device": args.device, "repeats": args.repeats, "differing": differing}
        args.json.write_text(json.dumps(record) + "\n", encoding="utf-8")
    return 1 if any(differing.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
