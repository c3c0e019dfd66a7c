"""A device without memory left in the middle of a call: torch's own error, and the next call is right.

python tests/device/out_of_memory.py [--device cuda] [--backend NAME] [--json FILE]

Every allocation of a call fails once: the limit of this process's memory rises until the call goes through.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from pathlib import Path

import flash_attn
import torch

MIB = 1 << 20
STEP = 2 * MIB  # the allocator takes memory of the device by pieces of this size


def forward_of(device: str):
    """A call whose out and lse take 64 MiB and more."""
    q, k, v = (torch.randn(4, 2048, 16, 256, device=device, dtype=torch.bfloat16) for _ in "qkv")
    return lambda: [flash_attn.flash_attn_func(q, k, v, causal=True)]


def backward_of(device: str):
    """The same with gradients: three of 64 MiB and the workspace."""
    q, k, v = (torch.randn(4, 2048, 16, 256, device=device, dtype=torch.bfloat16).requires_grad_() for _ in "qkv")
    dout = torch.randn_like(q)

    def call():
        out = flash_attn.flash_attn_func(q, k, v, causal=True)
        return [out.detach(), *torch.autograd.grad(out, (q, k, v), dout)]

    return call


def decode_of(device: str):
    """One query for many keys: a workspace for the parts."""
    q = torch.randn(1, 1, 64, 256, device=device, dtype=torch.bfloat16)
    k, v = (torch.randn(1, 65536, 8, 256, device=device, dtype=torch.bfloat16) for _ in "kv")
    return lambda: [flash_attn.flash_attn_with_kvcache(q, k, v)]


def failures(call, device: str, room: int) -> tuple[int, bool]:
    """The call under limits that rise from what is allocated already -> how often memory ran out, and whether every
    call that went through was right."""
    expected = call()
    torch.cuda.synchronize()
    total = torch.cuda.get_device_properties(device).total_memory
    failed, right = 0, True
    for extra in range(0, room, STEP):
        torch.cuda.empty_cache()
        limit = torch.cuda.memory_reserved(device) + extra
        torch.cuda.set_per_process_memory_fraction(limit / total, device)
        with contextlib.suppress(torch.OutOfMemoryError):
            results = None
            failed += 1
            results = call()
            failed -= 1
        torch.cuda.set_per_process_memory_fraction(1.0, device)
        again = call()  # after the failure, with memory
        for made in (results, again):
            right = right and (made is None or all(map(torch.equal, made, expected)))
    return failed, right


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--backend")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found = {}
    calls = {"forward": forward_of, "backward": backward_of, "decode": decode_of}
    chosen = flash_attn.use_backend(args.backend) if args.backend else contextlib.nullcontext()
    with chosen:
        for name, make in calls.items():
            failed, right = failures(make(args.device), args.device, 24 * MIB if name == "decode" else 480 * MIB)
            found[name] = {"ran out": failed, "right": right}
            print("right" if right and failed else "WRONG", name, f"ran out of memory {failed} times", flush=True)
    if args.json:
        args.json.write_text(json.dumps({"name": "out of memory", "device": args.device, "found": found}) + "\n")
    return 0 if all(x["right"] and x["ran out"] for x in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
