"""Several GPUs at once: each call runs where its tensors are, whatever device is current, from several threads.

python tests/device/several_gpus.py [--device cuda] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
from pathlib import Path

import flash_attn
import torch


def step(seed: int, device: str) -> list:
    """out and gradients of a call of its own shape."""
    g = torch.Generator().manual_seed(seed)
    seqlen = 100 + 37 * seed
    q, k, v = (torch.randn(2, seqlen, 4, 64, generator=g).to(device, torch.bfloat16).requires_grad_() for _ in "qkv")
    out = flash_attn.flash_attn_func(q, k, v, causal=True, deterministic=True)
    return [x.cpu() for x in (out, *torch.autograd.grad(out, (q, k, v), torch.ones_like(out)))]


def many(devices: list[str], repeats: int) -> int:
    """Threads with both devices in turn, another current in each -> how many results differ from those made alone."""
    expected = [step(seed, devices[0]) for seed in range(4)]
    wrong = []

    def work(n: int) -> None:
        torch.get_device_module(devices[0]).set_device(n % len(devices))
        for i in range(repeats):
            seed = (i + n) % 4
            results = step(seed, devices[(i + n // 2) % len(devices)])
            if not all(map(torch.equal, results, expected[seed])):
                wrong.append((n, i))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    return len(wrong)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    n = torch.get_device_module(args.device).device_count()
    if n < 2:
        sys.exit(f"several_gpus: {args.device} has {n} device, two are needed")
    devices = [f"{args.device}:{i}" for i in range(n)]

    q = torch.randn(1, 8, 2, 64, device=devices[0])
    try:
        flash_attn.flash_attn_func(q, q.to(devices[1]), q)
        words = "no error"
    except flash_attn.InvalidArgument as e:
        words = str(e)
    print("tensors of two devices:", words)
    wrong = many(devices, 50)
    print(f"{wrong} of 200 results on {n} devices from 4 threads differ")
    if args.json:
        record = {"name": "several devices", "devices": n, "results": 200, "differing": wrong, "two devices": words}
        args.json.write_text(json.dumps(record) + "\n", encoding="utf-8")
    return 1 if wrong or "expected" not in words else 0


if __name__ == "__main__":
    sys.exit(main())
