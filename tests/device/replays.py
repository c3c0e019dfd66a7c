"""Launches that the core makes again by itself: right on other memory, streams, threads, in graphs, and as backends
come and go. And what is said of a device: nothing waits, long tensors and many sequences are served.

python tests/device/replays.py [--json FILE]    on an NVIDIA GPU
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import flash_attn
import torch
from flash_attn import _C
from flash_attn._engines.triton import backward, forget, forward

DEVICE = "cuda"
found: dict[str, bool] = {}


def check(name: str, is_right: bool, words: str = "") -> None:
    found[name] = bool(is_right)
    print("right" if is_right else "WRONG", name, words, flush=True)


@contextmanager
def nothing_recorded():
    """Every call is launched by the engine in the block."""
    kept = forward.recordable
    forward.recordable = backward.recordable = lambda p: False
    forget()
    try:
        yield
    finally:
        forward.recordable = backward.recordable = kept
        forget()


def randn(*shape, dtype=torch.bfloat16, grad=False):
    return torch.randn(shape, device=DEVICE, dtype=dtype).requires_grad_(grad)


def qkv(batch, seqlen, nheads, headdim, *, nheads_k=None, seqlen_k=None, **options):
    keys = (batch, seqlen_k or seqlen, nheads_k or nheads, headdim)
    return [randn(*shape, **options) for shape in ((batch, seqlen, nheads, headdim), keys, keys)]


def one_pass(**options):
    return lambda *inputs: (flash_attn.flash_attn_func(*inputs, **options),)


def both_passes(**options):
    def run(q, k, v, *more):
        names = dict(zip(("learnable_sink", "attn_bias"), more, strict=False))
        out = flash_attn.flash_attn_func(q, k, v, deterministic=True, **names, **options)
        return (out, *torch.autograd.grad(out.float().square().sum(), (q, k, v, *more)))

    return run


def packed(q, k, v):
    cu = torch.tensor([0, 100, 150, 300], dtype=torch.int32, device=DEVICE)
    return (flash_attn.flash_attn_varlen_func(q, k, v, cu, cu, 150, 150, causal=True),)


def decode(q, k, v, new_k, new_v):
    used = torch.tensor([700, 5], dtype=torch.int32, device=DEVICE)
    return flash_attn.flash_attn_with_kvcache(q, k, v, new_k, new_v, cache_seqlens=used, causal=True), k, v


VALUES = {
    "headdim 64": (lambda: qkv(2, 333, 4, 64, nheads_k=2, grad=True), both_passes(causal=True)),
    "headdim 128": (lambda: qkv(2, 333, 4, 128, nheads_k=2, grad=True), both_passes(causal=True)),
    "headdim 256": (lambda: qkv(2, 333, 4, 256, nheads_k=2, grad=True), both_passes(causal=True)),
    "fp16, window": (lambda: qkv(2, 200, 4, 64, dtype=torch.float16), one_pass(window_size=(20, 5))),
    "softcap, not aligned": (lambda: [x[..., 1:] for x in qkv(2, 200, 4, 65)], one_pass(softcap=5.0)),
    "split keys": (lambda: qkv(1, 1, 8, 128, seqlen_k=8192, nheads_k=2), one_pass()),
    "dropout": (lambda: qkv(2, 200, 4, 64, grad=True), both_passes(dropout_p=0.3)),
    "sink and bias": (
        lambda: [*qkv(2, 100, 4, 64, grad=True), randn(4, grad=True), randn(1, 4, 100, 100, grad=True)],
        both_passes(),
    ),
    "packed": (lambda: [randn(300, 4, 64) for _ in "qkv"], packed),
    "new keys": (
        lambda: [*qkv(2, 1, 8, 128, seqlen_k=1024, nheads_k=2), randn(2, 1, 2, 128), randn(2, 1, 2, 128)],
        decode,
    ),
}


def values() -> None:
    for name, (make, call) in VALUES.items():
        with nothing_recorded():
            torch.manual_seed(5)
            expected = [call(*make()) for _ in range(4)]
        torch.manual_seed(5)
        before, worst = _C.recordings(), 0.0
        for results in expected:
            for x, y in zip(call(*make()), results, strict=True):
                worst = max(worst, float((x.detach().double() - y.detach().double()).abs().max()))
        tolerance = 1e-5 if name == "sink and bias" else 0.0  # their gradients are summed atomically
        check(name, worst <= tolerance and _C.recordings() > before, f"largest difference {worst:.2g}")


def streams_and_threads() -> None:
    q, k, v = qkv(4, 1024, 16, 128)
    for _ in range(3):
        expected = flash_attn.flash_attn_func(q, k, v, causal=True)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        out = flash_attn.flash_attn_func(q.clone(), k, v, causal=True)  # behind the sleep, on this stream
    check("queued on the current stream", not stream.query())
    stream.synchronize()
    check("another stream", torch.equal(out, expected))
    results = []

    def work() -> None:
        results.extend(flash_attn.flash_attn_func(q, k, v, causal=True) for _ in range(50))
        torch.cuda.synchronize()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    check("four threads", len(results) == 200 and all(torch.equal(x, expected) for x in results))


def graphs() -> None:
    few, many = qkv(1, 1, 8, 128, seqlen_k=8192, nheads_k=2), qkv(2, 256, 4, 64, grad=True)
    dout = torch.randn_like(many[0])

    def step():
        out = flash_attn.flash_attn_func(*many, causal=True)
        return (flash_attn.flash_attn_func(*few), out, *torch.autograd.grad(out, many, dout))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(4):
            step()
    torch.cuda.current_stream().wait_stream(side)
    before, graph = _C.recordings(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    with torch.no_grad():
        for x in (*few, *many):
            x.copy_(torch.randn_like(x))
    graph.replay()
    results = [x.clone() for x in results]
    worst = max(float((x.float() - y.float()).abs().max()) for x, y in zip(results, step(), strict=True))
    check("a captured graph", worst < 2e-2 and _C.recordings() == before, f"largest difference {worst:.2g}")


class Noting:
    def __init__(self):
        self.calls = 0

    def forward(self, p, t):
        self.calls += 1
        t.out.zero_()


def backends_that_come_and_go() -> None:
    q, k, v = qkv(1, 64, 4, 64)
    for _ in range(3):
        expected = flash_attn.flash_attn_func(q, k, v)
    with flash_attn.use_backend("torch"):
        check("the switch is heard", torch.allclose(flash_attn.flash_attn_func(q, k, v), expected, atol=2e-2))
    noting = Noting()
    serves = {"devices": (DEVICE,), "dtypes": ("bfloat16",), "serves": flash_attn.features()}
    flash_attn.register_backend("noting", noting, before="triton", **serves)
    out = flash_attn.flash_attn_func(q, k, v)
    flash_attn.unregister_backend("noting")
    check("one in front is asked", noting.calls == 1 and not out.any())
    check("when it has gone", torch.equal(flash_attn.flash_attn_func(q, k, v), expected))


def nothing_waits() -> None:
    inputs = [randn(256, 4, 64, grad=True) for _ in "qkv"]
    cu = torch.tensor([0, 100, 256], dtype=torch.int32, device=DEVICE)
    q, k, v = qkv(2, 1, 4, 64, seqlen_k=256)
    new_k, new_v = k[:, :1].clone(), v[:, :1].clone()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            out = flash_attn.flash_attn_varlen_func(*inputs, cu, cu, 156, 156, 0.1, causal=True)
            torch.autograd.grad(out, inputs, torch.ones_like(out))
            flash_attn.flash_attn_with_kvcache(q, k, v, new_k, new_v, cache_seqlens=100, causal=True)
        check("nothing waits for the device", True)
    except RuntimeError as e:
        check("nothing waits for the device", False, str(e))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def large() -> None:
    x = randn(1, 270_000, 64, 128)  # 2.2e9 elements
    last = x[0, :, 63].float()
    for name, q, keys in (("keys", x[:, -4:], x), ("queries", x, x[:, :4])):
        out = flash_attn.flash_attn_func(q, keys, keys)[0, -4:, 63].float()
        values = last if name == "keys" else last[:4]
        expected = torch.softmax(last[-4:] @ values.T / math.sqrt(128), -1) @ values
        check(f"more than 2^31 elements of {name}", (out - expected).abs().max() < 2e-2)
    del x, last, values
    n = 80_000  # of two rows
    inputs = [randn(2 * n, 2, 64, grad=True) for _ in "qkv"]
    cu = 2 * torch.arange(n + 1, device=DEVICE, dtype=torch.int32)
    out = flash_attn.flash_attn_varlen_func(*inputs, cu, cu, 2, 2)
    heads_first = [t.reshape(n, 2, 2, 64).transpose(1, 2).float() for t in inputs]
    expected = torch.nn.functional.scaled_dot_product_attention(*heads_first).transpose(1, 2).reshape(2 * n, 2, 64)
    check("80000 sequences", (out.float() - expected).abs().max() < 3e-2)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    for part in (values, streams_and_threads, graphs, backends_that_come_and_go, nothing_waits, large):
        part()
    wrong = [name for name, is_right in found.items() if not is_right]
    if args.json:
        record = {"name": "replays", "device": DEVICE, "checks": len(found), "wrong": wrong}
        args.json.write_text(json.dumps(record) + "\n", encoding="utf-8")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
