"""The torch engine behind the public functions, on the CPU and on what accelerators this machine has."""

from __future__ import annotations

import flash_attn
import pytest
import torch

DEVICES = ["cpu"] + [d for d in ("cuda", "xpu") if getattr(torch, d).is_available()]
if torch.backends.mps.is_available():
    DEVICES.append("mps")


def cumulative(lengths, device):
    return torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)


def fixed(q, k, v, **options):
    return flash_attn.flash_attn_func(q, k, v, causal=True, softcap=5.0, return_attn_probs=True, **options)


def packed(q, k, v, **options):
    cu_q, cu_k = cumulative([30, 0, 7, 3], q.device), cumulative([11, 20, 2, 7], q.device)
    packed = (x.flatten(0, 1) for x in (q, k, v))
    return flash_attn.flash_attn_varlen_func(
        *packed, cu_q, cu_k, 30, 20, window_size=(9, 4), return_attn_probs=True, **options
    )


CALLS = {"fixed": fixed, "packed": packed}


def operands(device, dtype):
    g = torch.Generator().manual_seed(2)
    x = [torch.randn(2, 20, heads, 16, generator=g) for heads in (4, 2, 2, 4)]
    return [x.to(device, dtype) for x in x], {"learnable_sink": torch.randn(4, generator=g).to(device)}


def results(call, device, dtype, dropout_p=0.0):
    """-> out, lse and the gradients, on the CPU."""
    (*leaves, dout), options = operands(device, dtype)
    leaves = [x.requires_grad_() for x in (*leaves, *options.values())]
    torch.manual_seed(4)
    out, lse, _ = call(*leaves[:3], learnable_sink=leaves[3], dropout_p=dropout_p)
    gradients = torch.autograd.grad((out, lse), leaves, (dout.view_as(out), torch.ones_like(lse)))
    return [x.detach().cpu().double() for x in (out, lse, *gradients)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("call", CALLS)
def test_calls_and_gradients(call, dtype, device):
    with flash_attn.use_backend("torch"):
        ours = results(CALLS[call], device, dtype)
    with flash_attn.use_backend("reference"):
        theirs = results(CALLS[call], "cpu", dtype)
    eps = torch.finfo(dtype).eps
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=4 * eps, atol=32 * eps)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("used", ["table", "int"])
@pytest.mark.parametrize("pages", [False, True])
def test_a_decode_step(pages, used, device):
    g = torch.Generator().manual_seed(2)
    shape = (12, 8, 2, 16) if pages else (3, 32, 2, 16)
    table = torch.randperm(12, generator=g).view(3, 4).to(torch.int32) if pages else None
    k_cache, v_cache, k, v, q = (
        torch.randn(s, generator=g) for s in (shape, shape, (3, 2, 2, 16), (3, 2, 2, 16), (3, 2, 4, 16))
    )
    cos, sin = torch.rand(40, 8, generator=g), torch.rand(40, 8, generator=g)
    seqlens = 19 if used == "int" else torch.tensor([19, 0, 30], dtype=torch.int32)

    def step(device):
        def there(x):
            return x.to(device, copy=True) if isinstance(x, torch.Tensor) else x

        caches = there(k_cache), there(v_cache)
        rest = [there(x) for x in (k, v, cos, sin, seqlens)]
        out, lse = flash_attn.flash_attn_with_kvcache(
            there(q), *caches, *rest, block_table=there(table), causal=True, return_softmax_lse=True
        )
        return [x.cpu() for x in (*caches, out, lse)]

    with flash_attn.use_backend("torch"):
        ours = step(device)
    with flash_attn.use_backend("reference"):
        theirs = step("cpu")
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)
    if device == "cpu":
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])


def test_the_plan_is_explained():
    (q, k, v, _), _ = operands("cpu", torch.float64)
    with flash_attn.use_backend("torch"):
        explanation = flash_attn.explain(q, k, v)
    assert explanation.plan == (
        "PyTorch operations on 2 sequences x 20 rows x 24 keys at a time, all heads; sums in float64"
    )


@pytest.mark.skipif("cuda" not in DEVICES, reason="needs a CUDA device")
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_is_captured_in_a_graph(dropout_p):
    """On a stream of its own, with tables changed between replays."""
    (q, k, v, dout), options = operands("cuda", torch.float32)
    cu = cumulative([20, 20], "cuda")

    def step():
        leaves = [x.flatten(0, 1).detach().requires_grad_() for x in (q, k, v)]
        out = flash_attn.flash_attn_varlen_func(*leaves, cu, cu, 40, 40, dropout_p, causal=True, **options)
        return out.detach(), *torch.autograd.grad(out, leaves, dout.view_as(out))

    with flash_attn.use_backend("torch"):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            step()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        for lengths in ([20, 20], [3, 30], [0, 40]):
            cu.copy_(cumulative(lengths, "cuda"))
            q.normal_()
            graph.replay()
            if not dropout_p:  # else the generator has moved on
                for x, y in zip(captured, step(), strict=True):
                    assert torch.equal(x, y)
            assert all(x.isfinite().all() for x in captured)
