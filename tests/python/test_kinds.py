"""Kinds of trouble that users of attention libraries meet, each as a table."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import warnings

import flash_attn
import numpy as np
import pytest
import torch
from flash_attn import flash_attn_interface as interface
from support import device as under_test
from support.device import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
)
from torch.utils.flop_counter import FlopCounterMode

CU = torch.tensor([0, 5, 5, 12], dtype=torch.int32)


def fixed(requires_grad=False, dtype=torch.float32):
    g = torch.Generator().manual_seed(2)
    shapes = [(2, 9, 4, 16), (2, 11, 2, 16), (2, 11, 2, 16)]
    return [torch.randn(s, generator=g).to(dtype).requires_grad_(requires_grad) for s in shapes]


def packed(requires_grad=False):
    g = torch.Generator().manual_seed(4)
    return [torch.randn(12, h, 16, generator=g).requires_grad_(requires_grad) for h in (4, 2, 2)]


# ---- A gradient that is asked for is computed, or raises. It is never zero, and never None. --------------------------


def second_derivatives(loss):
    """The gradient of a gradient, for a loss whose own gradient depends on nothing."""
    q, k, v = fixed(requires_grad=True)
    (g,) = torch.autograd.grad(loss(flash_attn_func(q, k, v)), q, create_graph=True)
    g.square().sum().backward()


def frozen_layer():
    q, k, v = fixed(requires_grad=True)
    out = flash_attn_func(q, k, v) @ torch.randn(16, 3)
    (g,) = torch.autograd.grad(out.sum(), v, create_graph=True)
    torch.autograd.grad(g.square().sum(), q)


def hessian():
    _, k, v = fixed()
    torch.autograd.functional.hessian(lambda x: flash_attn_func(x, k, v).sum(), fixed()[0])


def hvp():
    q, k, v = fixed()
    torch.autograd.functional.hvp(lambda x: flash_attn_func(q, x, v).sum(), k, torch.ones_like(k))


def packed_second_derivatives():
    qkv = torch.randn(12, 3, 2, 16, requires_grad=True)
    out = flash_attn.flash_attn_varlen_qkvpacked_func(qkv, CU, 7)
    (g,) = torch.autograd.grad(out.sum(), qkv, create_graph=True)
    g.square().sum().backward()


def of_a_sink():
    q, k, v = fixed()
    sink = torch.randn(4, requires_grad=True)
    (g,) = torch.autograd.grad(flash_attn_func(q, k, v, learnable_sink=sink).sum(), sink, create_graph=True)
    g.square().sum().backward()


def of_pages():
    pages = torch.randn(4, 4, 2, 16, requires_grad=True)
    table = torch.tensor([[0, 1], [2, 3], [1, 0]], dtype=torch.int32)
    out = flash_attn_varlen_func(packed(True)[0], pages, pages, CU, CU, 7, 7, block_table=table)
    out.sum().backward()


def of_a_cache(which, compiled=False):
    def step(**inputs):
        leaf = inputs[which]
        if which.endswith("cache"):
            inputs[which] = leaf.clone()  # no leaf: it is written to
        return flash_attn.flash_attn_with_kvcache(**inputs, cache_seqlens=3).sum() + leaf.sum()

    q, k, v = fixed()
    inputs = {"q": q, "k_cache": k, "v_cache": v, "k": torch.randn(2, 1, 2, 16), "v": torch.randn(2, 1, 2, 16)}
    inputs = {name: x.to(under_test.DEVICE) for name, x in inputs.items()}
    inputs[which] = inputs[which].clone().requires_grad_()
    if compiled:
        if which.endswith("cache"):
            inputs["k"] = inputs["v"] = None  # a compiler records no cache that is written to
        torch.compiler.reset()
        step = torch.compile(step, backend="aot_eager", fullgraph=True)
    step(**inputs).backward()


def of_an_operator():
    q, k, v = fixed(requires_grad=True)
    out, *_ = torch.ops.flash_attn._flash_attn_forward(q, k, v, 0.0, 0.25, True, -1, -1, 0.0, None, False)
    out.sum().backward()


def tangent_of(function):
    with torch.autograd.forward_ad.dual_level():
        q, k, v = fixed()
        function(torch.autograd.forward_ad.make_dual(q, q), k, v)


def forward_operator(q, k, v):
    torch.ops.flash_attn._flash_attn_forward(q, k, v, 0.0, 0.25, True, -1, -1, 0.0, None, False)


LOST = {
    "loss = out.sum()": (lambda: second_derivatives(torch.sum), "second derivatives"),
    "loss = out.square().sum()": (lambda: second_derivatives(lambda out: out.square().sum()), "second derivatives"),
    "a frozen layer behind": (frozen_layer, "second derivatives"),
    "hessian": (hessian, "second derivatives"),
    "hvp": (hvp, "second derivatives"),
    "qkvpacked": (packed_second_derivatives, "second derivatives"),
    "of a sink": (of_a_sink, "second derivatives"),
    "pages": (of_pages, "block_table"),
    **{f"a cache's {x}": (lambda x=x: of_a_cache(x), "no derivative") for x in ("q", "k_cache", "v_cache", "k", "v")},
    **{
        f"a cache's {x}, compiled": (lambda x=x: of_a_cache(x, True), "no derivative")
        for x in ("q", "k_cache", "v_cache", "k", "v")
    },
    "an operator": (of_an_operator, "no derivative"),
    "a tangent": (lambda: tangent_of(flash_attn_func), "jvp"),
    "a tangent, with a cache": (lambda: tangent_of(flash_attn_with_kvcache), "no derivative"),
    "a tangent, of an operator": (lambda: tangent_of(forward_operator), "no derivative"),
}


@pytest.mark.device
@pytest.mark.parametrize("what", LOST)
def test_a_gradient_that_is_not_served_raises(what):
    step, words = LOST[what]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # autograd's way to lose a gradient is a warning
        with pytest.raises(RuntimeError) as raised:
            step()
    if under_test.BACKEND and "does not serve this call" in str(raised.value):
        pytest.skip(f"refused: {raised.value}")
    assert re.search(words, str(raised.value))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", ["softmax_scale", "softcap", "alibi_slopes"])
@pytest.mark.parametrize("inputs_too", [False, True])
def test_arguments_without_a_gradient_do_not_ask_for_one(name, inputs_too, compiled):
    value = torch.full((4,) if name == "alibi_slopes" else (), 0.5)
    q, k, v = fixed(inputs_too)

    def step(q, k, v, value):
        return flash_attn_func(q, k, v, **{name: value})

    if compiled:
        torch.compiler.reset()
        step = torch.compile(step, backend="aot_eager")
    with pytest.raises(RuntimeError, match=f"{name}: has no gradient"):
        step(q, k, v, value.clone().requires_grad_())
    with torch.no_grad():
        want = step(q, k, v, value)
        assert torch.equal(step(q, k, v, value.clone().requires_grad_()), want)


def test_an_operator_computes_while_it_is_not_differentiated():
    q, k, v = fixed(requires_grad=True)
    out, *_ = torch.ops.flash_attn._flash_attn_forward(q, k, v, 0.0, 0.25, True, -1, -1, 0.0, None, False)
    assert torch.equal(out, flash_attn_func(q, k, v, softmax_scale=0.25, causal=True))


# ---- Autograd sees every write to a tensor that it has saved ---------------------------------------------------------


def write_cache(k_cache):
    q, new = torch.randn(2, 1, 4, 16), torch.randn(2, 1, 2, 16)
    flash_attn_with_kvcache(q, k_cache, torch.zeros_like(k_cache), new, new, cache_seqlens=3)


def write_gradient(dk):
    q, k, v = fixed()
    scores = (0.0, 0.25, True, -1, -1, 0.0, None)
    out, lse, *_ = torch.ops.flash_attn._flash_attn_forward(q, k, v, *scores, False)
    results = torch.empty_like(q), dk, torch.empty_like(v)
    torch.ops.flash_attn._flash_attn_backward(out, q, k, v, out, lse, *results, *scores, False)


MODES = {
    "eager": lambda: [],
    "a dispatch mode": lambda: [FlopCounterMode(display=False)],
    "inference": lambda: [torch.inference_mode()],
    "both": lambda: [torch.inference_mode(), FlopCounterMode(display=False)],
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("write", [write_cache, write_gradient])
def test_autograd_sees_writes(write, mode):
    saved = torch.zeros(2, 11, 2, 16)
    loss = (saved * torch.ones_like(saved).requires_grad_()).sum()
    with contextlib.ExitStack() as stack:
        for context in MODES[mode]():
            stack.enter_context(context)
        write(saved)
    assert saved.abs().sum() > 0
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ---- torch.compile takes what eager takes ----------------------------------------------------------------------------

AS_NUMBERS = {
    "max_seqlen a 0-d tensor": lambda: {"max_seqlen_q": torch.tensor(7), "max_seqlen_k": torch.tensor(7)},
    "max_seqlen np.int64": lambda: {"max_seqlen_q": np.int64(7), "max_seqlen_k": np.int64(7)},
    "max_seqlen None": lambda: {"max_seqlen_q": None, "max_seqlen_k": None},
    "window a tensor": lambda: {"window_size": torch.tensor([3, 2])},
    "window a list": lambda: {"window_size": [3, 2]},
    "window of np.int64": lambda: {"window_size": (np.int64(3), np.int64(2))},
    "window of 0-d tensors": lambda: {"window_size": (torch.tensor(3), torch.tensor(2))},
    "scale np.float32": lambda: {"softmax_scale": np.float32(0.25)},
    "scale a 0-d tensor": lambda: {"softmax_scale": torch.tensor(0.25)},
    "softcap np.float64": lambda: {"softcap": np.float64(3.0)},
    "scale an int": lambda: {"softmax_scale": 1, "softcap": 2},
    "causal a tensor": lambda: {"causal": torch.tensor(True)},
}


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("what", AS_NUMBERS)
def test_compiles_what_eager_takes(what, requires_grad):
    call = {"cu_seqlens_q": CU, "cu_seqlens_k": CU, "max_seqlen_q": 7, "max_seqlen_k": 7, **AS_NUMBERS[what]()}
    leaves = packed(requires_grad)

    def run(function):
        out = function(*leaves, **call)
        return [out.detach(), *(torch.autograd.grad(out.square().sum(), leaves) if requires_grad else ())]

    torch.compiler.reset()
    compiled = torch.compile(lambda *x, **c: flash_attn_varlen_func(*x, **c), backend="aot_eager")
    for a, b in zip(run(compiled), run(flash_attn_varlen_func), strict=True):
        assert torch.equal(a, b)


# ---- Errors are caught as code written for the original catches them -------------------------------------------------


@pytest.mark.device
@pytest.mark.parametrize(
    "call, classes",
    [
        (lambda: flash_attn_func(*(x[..., :0] for x in fixed())), (flash_attn.InvalidArgument, ValueError)),
        (lambda: flash_attn_func(*fixed(), window_size=3), (flash_attn.InvalidArgument, ValueError)),
        (lambda: flash_attn_func(*fixed(), softcap=float("nan")), (flash_attn.InvalidArgument, ValueError)),
        (lambda: flash_attn_func(fixed()[0], None, None), (flash_attn.InvalidType, TypeError)),
        (lambda: flash_attn_func(*fixed(), dropout_p="much"), (flash_attn.InvalidType, TypeError)),
        (lambda: flash_attn_func(*fixed(), learnable_sink=[0.0] * 4), (flash_attn.InvalidType, TypeError)),
        (lambda: flash_attn_func(*fixed(), attn_bias="mask"), (flash_attn.InvalidType, TypeError)),
        (lambda: flash_attn_func(*fixed(True), alibi_slopes=0.5), (flash_attn.InvalidType, TypeError)),
        (lambda: flash_attn_func(*(x.int() for x in fixed())), (flash_attn.InvalidType, TypeError)),
        (lambda: flash_attn_func(*fixed(dtype=torch.complex64)), (flash_attn.InvalidType, TypeError)),
        (lambda: flash_attn_func(*(x.bool() for x in fixed())), (flash_attn.InvalidType, TypeError)),
        (lambda: unserved(), (flash_attn.NotServed, NotImplementedError)),
        (lambda: unknown_backend(), (flash_attn.InvalidArgument, ValueError)),
    ],
)
def test_errors_are_runtime_errors_too(call, classes):
    with pytest.raises(RuntimeError) as raised:
        call()
    assert type(raised.value) is classes[0] and isinstance(raised.value, classes[1])


def unserved():
    with flash_attn.use_backend("cpu"):
        flash_attn_func(*fixed(dtype=torch.float64))


def unknown_backend():
    with flash_attn.use_backend("warp"):
        pass


@pytest.mark.device
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.complex64, torch.bool, torch.uint8, torch.int32])
def test_only_what_is_served_is_suggested(dtype):
    q = torch.zeros(1, 4, 2, 16).to(dtype)
    with pytest.raises(TypeError) as raised:
        flash_attn_func(q, q, q)
    words = str(raised.value)
    assert words.startswith("q: expected float16, bfloat16, float32 or float64, got")
    assert words.endswith(str(dtype)[6:])


def test_unknown_keywords_are_named():
    with pytest.raises(TypeError, match="unexpected keyword argument 's_aux'.*learnable_sink"):
        flash_attn_func(*fixed(), s_aux=torch.zeros(4))


# ---- Extensions reach every function ---------------------------------------------------------------------------------


@pytest.mark.device
def test_chunks():
    """A query sees keys of its own chunk only: a block-diagonal mask where lengths are equal."""
    q, k, v = (x[:, :9] for x in fixed())
    same = torch.arange(9) // 4 == (torch.arange(9) // 4)[:, None]
    for causal in (False, True):
        bias = torch.where(same & ~torch.ones(9, 9).triu(1).bool() if causal else same, 0.0, -torch.inf)[None, None]
        out = flash_attn_func(q, k, v, causal=causal, attention_chunk=4)
        torch.testing.assert_close(out, flash_attn_func(q, k, v, attn_bias=bias))
    qkv, kv = torch.stack([k, k, v], 2), torch.stack([k, v], 2)
    want = flash_attn_func(k, k, v, attention_chunk=4)
    assert torch.equal(flash_attn_qkvpacked_func(qkv, attention_chunk=4), want)
    assert torch.equal(flash_attn_kvpacked_func(k, kv, attention_chunk=4), want)
    assert torch.equal(flash_attn_with_kvcache(k, k, v, attention_chunk=4), want)
    cu = torch.tensor([0, 9, 18], dtype=torch.int32)
    varlen = flash_attn_varlen_func(*(x.flatten(0, 1) for x in (k, k, v)), cu, cu, 9, 9, attention_chunk=4)
    assert torch.equal(varlen.unflatten(0, (2, 9)), want)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    grads = torch.autograd.grad(flash_attn_func(*leaves, attention_chunk=4).square().sum(), leaves)
    bias = torch.where(same, 0.0, -torch.inf)[None, None]
    wants = torch.autograd.grad(flash_attn_func(*leaves, attn_bias=bias).square().sum(), leaves)
    for a, b in zip(grads, wants, strict=True):
        torch.testing.assert_close(a, b)
    _, _, S = flash_attn_func(q, k, v, 0.5, attention_chunk=4, return_attn_probs=True)
    assert not S[:, :, :9, :9][:, :, ~same].any() and S[:, :, :9, :9][:, :, same].abs().min() > 0


def test_chunks_compile():
    _, k, v = fixed()
    torch.compiler.reset()
    compiled = torch.compile(lambda *x: flash_attn_func(*x, attention_chunk=4), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(k, k, v), flash_attn_func(k, k, v, attention_chunk=4))


# ---- Profilers and counters see calls --------------------------------------------------------------------------------

CALLS = {
    "flash_attn_func": lambda: flash_attn_func(*fixed()),
    "flash_attn_kvpacked_func": lambda: flash_attn.flash_attn_kvpacked_func(fixed()[0], torch.stack(fixed()[1:], 2)),
    "flash_attn_qkvpacked_func": lambda: flash_attn.flash_attn_qkvpacked_func(torch.randn(2, 9, 3, 4, 16)),
    "flash_attn_varlen_func": lambda: flash_attn_varlen_func(*packed(), CU, CU, 7, 7),
    "flash_attn_with_kvcache": lambda: flash_attn_with_kvcache(*fixed(), cache_seqlens=11),
}


@pytest.mark.parametrize("name", CALLS)
def test_profilers_show_calls_by_their_names(name):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        CALLS[name]()
    assert [e.count for e in profile.key_averages() if e.key == name] == [1]


PAIRS, SQUARES = 2 * 9 * 11 * 4, (25 + 49) * 4
FLOPS = {
    "flash_attn_func": 2 * PAIRS * 32,
    "flash_attn_kvpacked_func": 2 * PAIRS * 32,
    "flash_attn_qkvpacked_func": 2 * 2 * 81 * 4 * 32,
    "flash_attn_varlen_func": 2 * SQUARES * 32,
    "flash_attn_with_kvcache": 2 * PAIRS * 32,
}


@pytest.mark.parametrize("name", FLOPS)
def test_flops_are_counted(name):
    with FlopCounterMode(display=False) as counter:
        CALLS[name]()
    assert counter.get_total_flops() == FLOPS[name]


@pytest.mark.parametrize("order", ["flash_attn, torch.utils.flop_counter", "torch.utils.flop_counter, flash_attn"])
def test_flops_are_counted_whoever_is_imported_first(order):
    code = f"""
import torch, {order}
with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
    flash_attn.flash_attn_func(*[torch.zeros(1, 2, 1, 8)] * 3)
print(counter.get_total_flops(), torch.utils.flop_counter.__spec__.name)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == [str(2 * 4 * 16), "torch.utils.flop_counter"]


def test_flops_of_both_passes_are_those_of_the_products():
    q, k, v = (torch.randn(2, 9, 4, 16, requires_grad=True) for _ in range(3))
    with FlopCounterMode(display=False) as products:
        a, b, c = (x.transpose(1, 2) for x in (q, k, v))
        torch.matmul(torch.softmax(torch.matmul(a, b.transpose(-1, -2)), -1), c)
    with FlopCounterMode(display=False) as counter:
        flash_attn_func(q, k, v).sum().backward()
    forward = products.get_total_flops()
    assert counter.get_total_flops() == forward + forward * 5 // 2 > 0


# ---- The raw module --------------------------------------------------------------------------------------------------


def test_the_raw_module_has_upstreams_five_functions():
    raw = interface.flash_attn_gpu
    q, k, v = fixed()
    want, want_lse, _ = flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    mine = torch.empty_like(q)
    out, lse, S_dmask, rng_state = raw.fwd(q, k, v, mine, None, 0.0, 0.25, True, -1, 0, 0.0, False, None)
    assert out is mine and torch.equal(out, want) and torch.equal(lse, want_lse)
    assert S_dmask.numel() == 0 and rng_state.shape == (2,) and rng_state.dtype == torch.int64
    dout = torch.randn_like(out)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    wants = torch.autograd.grad(flash_attn_func(*leaves, causal=True), leaves, dout)
    grads = raw.bwd(
        dout, q, k, v, out, lse, None, None, None, None, 0.0, 0.25, True, -1, 0, 0.0, False, None, rng_state
    )
    assert all(torch.equal(a, b) for a, b in zip(grads, wants, strict=False)) and grads[3].shape == (2, 4, 128)

    q, k, v = packed()
    tail = (0.0, 0.25, False, True, -1, 0, 0.0)
    out, lse, *_ = raw.varlen_fwd(q, k, v, None, CU, CU, None, None, None, None, 7, 7, *tail, False, None)
    assert torch.equal(out, flash_attn_varlen_func(q, k, v, CU, CU, 7, 7, causal=True))
    results = raw.varlen_bwd(out, q, k, v, out, lse, None, None, None, CU, CU, None, 7, 7, *tail, False, None, None)
    assert [x.shape for x in results[:3]] == [x.shape for x in (q, k, v)] and results[3].shape == (4, 12 + 3 * 128)

    q, k, v = fixed()
    new = [torch.randn(2, 1, 2, 16) for _ in "kv"]
    used = torch.tensor([3, 4], dtype=torch.int32)
    caches = [[x.clone() for x in (k, v)] for _ in range(2)]
    out, lse = raw.fwd_kvcache(
        q, *caches[0], *new, used, None, None, None, None, None, None, None, 0.25, True, -1, 0, 0.0, True, 0
    )
    assert torch.equal(out, flash_attn_with_kvcache(q, *caches[1], *new, cache_seqlens=used, causal=True))
    assert all(torch.equal(a, b) for a, b in zip(*caches, strict=True))
    with pytest.raises(RuntimeError, match="gen: expected None"):
        raw.fwd(q, k, v, None, None, 0.0, 0.25, True, -1, 0, 0.0, False, torch.Generator())
