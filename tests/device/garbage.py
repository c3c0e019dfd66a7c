"""Tables on a device that hold anything: nothing outside the tensors is touched, and the next call is right.

compute-sanitizer --error-exitcode 9 python tests/device/garbage.py [--device cuda] [--draws 3]

What lies around the caches is compared; that nothing is read outside of a tensor only a tool can see.
"""

from __future__ import annotations

import argparse
import sys

import flash_attn
import torch

BATCH, HEADS, HEADS_K, HEADDIM, ROWS = 3, 4, 2, 64, 96
EXTREMES = (0, 1, -1, -7, 5, 95, 96, 97, 1000, 2**31 - 1, -(2**31))
AROUND = 4096  # elements before and behind a cache


def table(shape, g, device):
    choice = torch.randint(len(EXTREMES), shape, generator=g)
    return torch.tensor(EXTREMES, dtype=torch.int64)[choice].to(torch.int32).to(device)


def randn(*shape, device):
    return torch.randn(shape, device=device, dtype=torch.bfloat16)


def guarded(shape, device):
    """-> a tensor in the middle of a larger one, and that one."""
    n = torch.Size(shape).numel()
    whole = torch.full((n + 2 * AROUND,), 3.0, device=device, dtype=torch.bfloat16)
    return whole[AROUND : AROUND + n].view(shape), whole


def is_whole(whole) -> bool:
    return bool((whole[:AROUND] == 3).all() and (whole[-AROUND:] == 3).all())


def packed(g, device):
    total = BATCH * ROWS
    q, k, v = (randn(total, h, HEADDIM, device=device).requires_grad_() for h in (HEADS, HEADS_K, HEADS_K))
    cu = [table((BATCH + 1,), g, device) for _ in "qk"]
    for causal in (False, True):
        out = flash_attn.flash_attn_varlen_func(q, k, v, *cu, ROWS, ROWS, causal=causal)
        torch.autograd.grad(out, (q, k, v), torch.ones_like(out))


def pages(g, device):
    k, v = (randn(20, 16, HEADS_K, HEADDIM, device=device) for _ in "kv")
    q = randn(BATCH * 8, HEADS, HEADDIM, device=device)
    cu = torch.arange(0, 8 * BATCH + 1, 8, dtype=torch.int32, device=device)
    flash_attn.flash_attn_varlen_func(
        q, k, v, cu, table((BATCH + 1,), g, device), 8, ROWS, block_table=table((BATCH, 6), g, device)
    )


def cache(g, device, paged):
    shape = (20, 16, HEADS_K, HEADDIM) if paged else (BATCH + 1, ROWS, HEADS_K, HEADDIM)
    (k, around_k), (v, around_v) = (guarded(shape, device) for _ in "kv")
    q, new = randn(BATCH, 2, HEADS, HEADDIM, device=device), randn(BATCH, 2, HEADS_K, HEADDIM, device=device)
    cos, sin = (randn(ROWS + 40, 16, device=device) for _ in "cs")
    more = {"block_table": table((BATCH, 6), g, device)} if paged else {"cache_batch_idx": table((BATCH,), g, device)}
    flash_attn.flash_attn_with_kvcache(
        q, k, v, new, new, rotary_cos=cos, rotary_sin=sin, cache_seqlens=table((BATCH,), g, device),
        cache_leftpad=None if paged else table((BATCH,), g, device), causal=True, **more,
    )  # fmt: skip
    assert is_whole(around_k) and is_whole(around_v), "memory around a cache was written to"


def next_call_is_right(device):
    q = torch.randn(1, 33, 2, 64, device=device)
    plain = torch.nn.functional.scaled_dot_product_attention(*[q.double().transpose(1, 2)] * 3).transpose(1, 2)
    assert (flash_attn.flash_attn_func(q, q, q) - plain).abs().max() < 1e-5


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--draws", type=int, default=3)
    args = parser.parse_args()
    g = torch.Generator().manual_seed(0)
    for n in range(args.draws):
        packed(g, args.device)
        pages(g, args.device)
        cache(g, args.device, False)
        cache(g, args.device, True)
        next_call_is_right(args.device)
        print(f"draw {n + 1} of {args.draws}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
