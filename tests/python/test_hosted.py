"""Backends written in Python: registered, chosen, explained, refused, run and taken out again."""

from __future__ import annotations

import contextlib
import sys
import threading

import flash_attn
import pytest
import torch
from flash_attn import _C
from support.device_tensors import CUDA, HEXAGON, METAL, ROCM, XPU, OnDevice
from support.formula import attention
from support.groups import groups
from torch.utils.flop_counter import FlopCounterMode


class Toy:
    """The formula in PyTorch, for calls that it can read; notes what it was given."""

    def __init__(self, refusal=""):
        self.refusal, self.calls, self.tensors = refusal, [], []

    def refuses(self, p):
        return self.refusal

    def plan(self, p):
        return f"a toy of {p.nheads} heads"

    def _attend(self, p, q, k, v, sink=None):
        return attention(q, k, v, torch.float64, causal=p.causal, softmax_scale=p.scale, learnable_sink=sink)

    def forward(self, p, t):
        self.calls.append(p)
        self.tensors.append(t)
        out, lse = self._attend(p, t.q.detach(), t.k.detach(), t.v.detach())
        t.out.copy_(out)
        if t.lse is not None:
            t.lse.copy_(lse)

    def backward(self, p, t):
        self.calls.append(p)
        self.tensors.append(t)
        leaves = [x.detach().double().requires_grad_() for x in (t.q, t.k, t.v)]
        with torch.enable_grad():
            out, _ = self._attend(p, *leaves)
        for x, g in zip((t.dq, t.dk, t.dv), torch.autograd.grad(out, leaves, t.dout.double()), strict=True):
            x.copy_(g)


SERVES = ("causal", "grouped", "lse", "strided_columns", "blind_rows")


@pytest.fixture
def toy():
    yield from registered("toy", Toy())


def registered(name, engine, **settings):
    settings = {"devices": ("cpu",), "dtypes": ("float32",), "serves": SERVES, "backward": SERVES, **settings}
    flash_attn.register_backend(name, engine, **settings)
    try:
        yield engine
    finally:
        flash_attn.unregister_backend(name)


def inputs(requires_grad=False):
    g = torch.Generator().manual_seed(3)
    shapes = [(2, 9, 4, 16), (2, 11, 2, 16), (2, 11, 2, 16)]
    return [torch.randn(s, generator=g).requires_grad_(requires_grad) for s in shapes]


def chosen(explanation):
    return [c.backend for c in explanation.candidates if c.chosen]


def test_runs_on_the_callers_own_tensors(toy):
    q, k, v = inputs()
    with flash_attn.use_backend("toy"):
        out, lse, _ = flash_attn.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    (p,), (t,) = toy.calls, toy.tensors
    assert (
        t.q is q
        and t.k is k
        and t.v is v
        and t.out is out
        and t.lse is lse
        and t.bias is None
        and t.cu_seqlens_q is None
    )
    assert (p.batch, p.nheads, p.nheads_k, p.group, p.headdim, p.max_seqlen_q, p.max_seqlen_k) == (
        2,
        4,
        2,
        2,
        16,
        9,
        11,
    )
    assert p.causal and p.uses("grouped") and not p.uses("softcap") and p.scale == 0.25 and not p.is_backward
    assert "causal" in repr(p)
    with pytest.raises(ValueError, match="softcap"):
        p.uses("no such feature")
    torch.testing.assert_close(out, flash_attn.flash_attn_func(q, k, v, causal=True))


def test_differentiates(toy):
    leaves = inputs(requires_grad=True)
    with flash_attn.use_backend("toy"):
        out = flash_attn.flash_attn_func(*leaves, causal=True)
    grads = torch.autograd.grad(out.square().sum(), leaves)  # outside of the block: a named backend runs both passes
    assert [p.is_backward for p in toy.calls] == [False, True]
    want = torch.autograd.grad(flash_attn.flash_attn_func(*leaves, causal=True).square().sum(), leaves)
    for a, b in zip(grads, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("watched", ["forward", "backward"])
def test_runs_both_passes_also_where_a_mode_watches_one(watched):
    class Flat(Toy):
        """Its gradients are 0: under a mode there is no autograd for them."""

        def backward(self, p, t):
            self.calls.append(p)
            for x in (t.dq, t.dk, t.dv):
                x.zero_()

    def context(of):
        return FlopCounterMode(display=False) if of == watched else contextlib.nullcontext()

    leaves = inputs(requires_grad=True)
    for flat in registered("flat", Flat()):
        with flash_attn.use_backend("flat"), context("forward"):
            out = flash_attn.flash_attn_func(*leaves, causal=True)
        with context("backward"):
            out.sum().backward()
        assert [p.is_backward for p in flat.calls] == [False, True]


def test_is_chosen_by_itself_only_where_it_is_preferred(toy):
    q, k, v = inputs()
    flash_attn.flash_attn_func(q, k, v)
    assert not toy.calls and chosen(flash_attn.explain(q, k, v)) == ["cpu"]
    for first in registered("first", Toy(), before="cpu"):
        flash_attn.flash_attn_func(q, k, v)
        assert len(first.calls) == 1
        explanation = flash_attn.explain(q, k, v)
        assert chosen(explanation) == ["first"] and explanation.plan == "a toy of 4 heads"
        assert [b.name for b in flash_attn.backends()][0] == "first"
        assert chosen(flash_attn.explain(q, k, v, softcap=3.0)) == ["cpu"]
    for never in registered("never", Toy(), before="cpu", automatic=False):
        flash_attn.flash_attn_func(q, k, v)
        assert not never.calls


def test_the_environment_names_it(toy, monkeypatch):
    monkeypatch.setenv("FLASH_ATTENTION_BACKEND", "toy")
    flash_attn.flash_attn_func(*inputs())
    assert len(toy.calls) == 1


@pytest.mark.parametrize(
    "call, words",
    [
        ({"softcap": 3.0}, "softcap: not served"),
        ({"window_size": (3, 3)}, "window: not served"),
        ({"attention_chunk": 4}, "chunk: not served"),
        ({"learnable_sink": torch.zeros(4)}, "sink: not served"),
        ({"attn_bias": torch.zeros(1, 1, 1, 11)}, "bias: not served"),
        ({"alibi_slopes": torch.zeros(4)}, "alibi: not served"),
        ({"dropout_p": 0.5}, "dropout: not served"),
        ({"deterministic": True}, "deterministic: not served"),
    ],
    ids=str,
)
def test_what_its_data_lack_is_refused(toy, call, words):
    q, k, v = inputs()
    assert words in {c.backend: c.why_not for c in flash_attn.explain(q, k, v, **call).candidates}["toy"]
    with flash_attn.use_backend("toy"), pytest.raises(NotImplementedError, match=words):
        flash_attn.flash_attn_func(q, k, v, **call)
    assert not toy.calls


def test_dtypes_headdims_and_words_are_data():
    settings = {"dtypes": ("float16",), "headdim_multiple": 32, "max_headdim": 64, "words": {"softcap": "no caps here"}}
    q, k, v = inputs()
    for _ in registered("picky", Toy(), **settings):

        def why(*tensors, **call):
            return {c.backend: c.why_not for c in flash_attn.explain(*tensors, **call).candidates}["picky"]

        assert why(q, k, v) == "dtype: float32 is not served (float16 is)"
        assert why(q.half(), k.half(), v.half()) == "headdim: 16 is not served (multiples of 32 up to 64 are)"
        wide = [torch.zeros(1, 4, 2, 32).half()] * 3
        assert why(*wide) == "" and why(*wide, softcap=1.0) == "no caps here"
        (mine,) = (b for b in flash_attn.backends() if b.name == "picky")
        assert (
            mine.forward.dtypes == ("float16",)
            and mine.forward.max_headdim == 64
            and set(mine.forward.features) == set(SERVES)
        )


def test_a_refusal_after_the_choice_passes_the_call_on():
    q, k, v = inputs()
    for first in registered("first", Toy("not on a Sunday"), before="cpu"):
        want = flash_attn.flash_attn_func(q, k, v)
        assert not first.calls
        assert torch.isfinite(want).all()
        explanation = flash_attn.explain(q, k, v)
        assert chosen(explanation) == ["cpu"] and explanation.candidates[0].why_not == "not on a Sunday"
        with flash_attn.use_backend("first"), pytest.raises(NotImplementedError, match="not on a Sunday"):
            flash_attn.flash_attn_func(q, k, v)


def test_the_backward_may_run_elsewhere_unless_the_backend_was_named():
    leaves = inputs(requires_grad=True)
    for first in registered("first", Toy(), before="cpu", backward=None):
        out = flash_attn.flash_attn_func(*leaves)
        torch.autograd.grad(out.sum(), leaves)
        assert [p.is_backward for p in first.calls] == [False]
        with flash_attn.use_backend("first"), pytest.raises(NotImplementedError, match="its backward is not served"):
            flash_attn.flash_attn_func(*leaves)
        with flash_attn.use_backend("first"), torch.no_grad():
            flash_attn.flash_attn_func(*leaves)


def test_engines_are_imported_when_they_are_needed(tmp_path, monkeypatch):
    (tmp_path / "lazy_engine.py").write_text("from test_hosted import Toy\nmade = 0\nclass Engine(Toy):\n    pass\n")
    (tmp_path / "broken_engine.py").write_text("raise OSError('no driver')\n")
    monkeypatch.syspath_prepend(tmp_path)
    q, k, v = inputs()
    for _ in registered("lazy", "lazy_engine:Engine", before="cpu"):
        assert "lazy_engine" not in sys.modules
        flash_attn.flash_attn_func(q, k, v)
        assert "lazy_engine" in sys.modules
    for _ in registered("broken", "broken_engine:Engine", before="cpu"):
        flash_attn.flash_attn_func(q, k, v)  # the choice goes on
        unavailable = {b.name: b.unavailable for b in flash_attn.backends()}
        assert unavailable["broken"] == "OSError: no driver"
        with flash_attn.use_backend("broken"), pytest.raises(NotImplementedError, match="no driver"):
            flash_attn.flash_attn_func(q, k, v)
    for _ in registered("needy", Toy(), needs=("no_such_module", "sys"), before="cpu"):
        assert {b.name: b.unavailable for b in flash_attn.backends()}["needy"] == "no_such_module is not installed"


@pytest.mark.parametrize(
    "wrong, words",
    [
        ({"dtypes": ("int8",)}, "dtypes: expected float16"),
        ({"serves": ("speed",)}, "serves: expected features among"),
        ({"before": "nobody"}, "before: expected one of"),
        ({"name": "cpu"}, "registered already"),
        ({"devices": "cpu"}, "devices: expected several names"),
        ({"engine": "some.module"}, "engine: expected an object, or"),
        ({"headdim_multiple": 0}, "headdim_multiple: expected at least 1, got 0"),
        ({"max_headdim": -1}, "max_headdim: expected at least 0"),
    ],
    ids=str,
)
def test_malformed_registrations(wrong, words):
    settings = {"devices": ("cpu",), "dtypes": ("float32",), "serves": SERVES, **wrong}
    with pytest.raises(ValueError, match=words):
        flash_attn.register_backend(settings.pop("name", "wrong"), settings.pop("engine", Toy()), **settings)
    assert "wrong" not in [b.name for b in flash_attn.backends()]
    flash_attn.flash_attn_func(*inputs())


def test_calls_go_on_while_backends_come_and_go():
    class Idle:
        def forward(self, p, t):
            t.out.zero_()

    q, k, v = inputs()
    failures, over = [], threading.Event()

    def call():
        try:
            while not over.is_set():
                flash_attn.flash_attn_func(q, k, v)
                flash_attn.explain(q, k, v)
        except Exception as e:
            failures.append(e)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    threads = [threading.Thread(target=call) for _ in range(3)]
    try:
        for thread in threads:
            thread.start()
        for _ in range(1000):
            for _ in registered("fleeting", Idle(), before="cpu"):
                pass
    finally:
        over.set()
        for thread in threads:
            thread.join()
        sys.setswitchinterval(interval)
    assert not failures


def test_under_compile(toy):
    torch.compiler.reset()
    leaves = inputs(requires_grad=True)
    step = torch.compile(
        lambda q, k, v: flash_attn.flash_attn_func(q, k, v, causal=True), backend="aot_eager", fullgraph=True
    )
    with flash_attn.use_backend("toy"):
        out = step(*leaves)
        torch.autograd.grad(out.sum(), leaves)
    assert [p.is_backward for p in toy.calls] == [False, True]


# ---- Devices that this machine does not have -------------------------------------------------------------------------


def explain_on(device_type, *, tables=False, **call):
    """-> describe, {backend: why_not}, the Problem; of packed sequences, whose tables must not be read."""
    q, k = (OnDevice(torch.zeros(10, heads, 16), device_type) for heads in (4, 2))
    lse = OnDevice(torch.zeros(4, 10), device_type)
    garbage = OnDevice(torch.tensor([5, -7, 2**30], dtype=torch.int32), device_type)
    sequences = {"cu_seqlens_q": garbage, "cu_seqlens_k": garbage, "max_seqlen_q": 2**40, "max_seqlen_k": 7}
    problem, candidates, _, p, _ = _C.explain_forward(
        q, k, k, OnDevice(torch.zeros(10, 4, 16), device_type), lse, *groups(**sequences, **call)
    )
    return problem, {name: why_not for name, _, why_not in candidates}, p


@pytest.mark.parametrize("device_type, name", [(CUDA, "cuda:0"), (ROCM, "rocm:0"), (XPU, "xpu:0"), (METAL, "mps:0")])
def test_a_device_is_served_by_those_who_name_it(device_type, name):
    settings = {"devices": ("cuda", "xpu", "mps"), "serves": (*SERVES, "packed_q", "packed_k")}
    for _ in registered("gpu", Toy(), **settings):
        problem, why_not, p = explain_on(device_type, causal=True)
        assert problem.endswith(f"on {name}") and why_not["gpu"] == ""
        assert why_not["cpu"] == why_not["reference"] == f"device: serves cpu tensors, not those on {name}"
        assert (p.max_seqlen_q, p.max_seqlen_k) == (10, 7)  # bounds of the caller, within the rows there are
        assert (
            "packed_k: not served" not in explain_on(device_type, softcap=2.0)[1]["gpu"]
            and explain_on(device_type, softcap=2.0)[1]["gpu"]
        )


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_workspace_comes_from_the_frameworks_allocator(device):
    """Of a device: two pieces, apart, given back. The CPU's backends have memory of their own."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    assert _C.workspace_works(torch.zeros(1, device=device), 1 << 20) == (device != "cpu")


def test_nobody_serves_a_device_that_nobody_names():
    q, out = (OnDevice(torch.zeros(1, 4, 2, 16), HEXAGON) for _ in range(2))
    with pytest.raises(NotImplementedError) as raised:
        _C.forward(q, q, q, out, None)
    words = str(raised.value)
    assert f"on device type {HEXAGON}:0" in words and "register_backend" in words and "move them to the CPU" in words


def test_mixed_devices_are_named():
    q, here = OnDevice(torch.zeros(1, 4, 2, 16), CUDA, 1), torch.zeros(1, 4, 2, 16)
    with pytest.raises(ValueError, match="k: expected a tensor on cuda:1 as q is, got one on the CPU"):
        _C.forward(q, here, here, here, None)
    with pytest.raises(ValueError, match="k: expected a tensor on the CPU as q is, got one on cuda:1"):
        _C.forward(here, q, here, here.clone(), None)


def test_the_state_of_dropout_stays_on_the_device():
    state = OnDevice(torch.tensor([7, 8]))
    _, why_not, p = explain_on(CUDA, dropout_p=0.25, rng_state=state)
    assert p.uses("dropout") and p.drop_threshold == 16384 and (p.seed, p.offset) == (0, 0)
    with pytest.raises(TypeError, match="dropout.state: expected int64"):
        explain_on(CUDA, dropout_p=0.25, rng_state=OnDevice(torch.zeros(2, dtype=torch.int32)))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"cu_seqlens_q": [0, 9, 5]}, r"cu_seqlens_q\[2\]: expected at least the entry before"),
        ({"cu_seqlens_k": [0, 5, 11]}, r"cu_seqlens_k\[2\]: expected at most the rows there are"),
        ({"seqused_k": [6, 1]}, r"seqused_k\[0\]: expected 0 <= entry"),
        ({"leftpad_k": [0, 6]}, r"leftpad_k\[1\]"),
        ({"max_seqlen_q": 3}, "max_seqlen_q: expected at least the longest sequence, 5, got 3"),
    ],
    ids=str,
)
def test_tables_of_a_device_are_checked_once_copied(change, words):
    """What FLASH_ATTENTION_CHECK=1 does: the tables come as copies, all else is on the device."""
    good = {"cu_seqlens_q": [0, 5, 10], "cu_seqlens_k": [0, 5, 10], "max_seqlen_q": 5, "max_seqlen_k": 5}
    q, k, out = (OnDevice(torch.zeros(10, heads, 16)) for heads in (4, 2, 4))

    def check(call):
        tables = {n: torch.tensor(x, dtype=torch.int32) if isinstance(x, list) else x for n, x in call.items()}
        _C.check_forward(q, k, k, out, None, *groups(**tables))

    check(good)
    with pytest.raises(ValueError, match=words):
        check({**good, **change})


@pytest.mark.parametrize("device_type", [CUDA, METAL])
def test_checking_tables_asks_nothing_of_where_tensors_lie(device_type):
    """Metal's handles are no addresses: those of two tensors stand closer together than the tensors are long, and
    slices of one tensor share theirs."""
    q, out, dout, dq, dk = (OnDevice(torch.zeros(10, 4, 16), device_type) for _ in range(5))
    lse = OnDevice(torch.zeros(4, 10), device_type)
    if device_type == METAL:
        for i, x in enumerate((out, dout, lse, dq, dk)):
            x._managed.data = q._managed.data + 64 * min(i, 3)
    cu = torch.tensor([0, 5, 10], dtype=torch.int32)
    call = groups(cu_seqlens_q=cu, cu_seqlens_k=cu)
    _C.check_forward(q, q, q, out, lse, *call)
    _C.check_backward(
        dout, q, q, q, out, lse, dq, dk, OnDevice(torch.zeros(10, 4, 16), device_type), None, None, None, *call
    )
