"""The backend switch, explain, and what the package says of this machine."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import flash_attn
import pytest
import torch
from flash_attn import flash_attn_func


def inputs(dtype=torch.float32):
    g = torch.Generator().manual_seed(1)
    return [torch.randn(1, 40, 2, 32, generator=g).to(dtype) for _ in range(3)]


def run_python(code, **env):
    path = os.pathsep.join(p for p in sys.path if p)
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path, **env}
    )


CALL = "import torch, flash_attn; q = torch.ones(1, 4, 2, 8); print(flash_attn.flash_attn_func(q, q, q).sum().item())"


def test_backends_are_listed():
    names = [b.name for b in flash_attn.backends()]
    assert names[0] == "cpu" and "reference" in names
    assert all(b.description for b in flash_attn.backends())
    assert flash_attn.cpu_isa() in flash_attn.cpu_isas() and "baseline" in flash_attn.cpu_isas()


def chosen(q) -> str:
    """Who serves flash_attn_func(q, q, q)."""
    flash_attn_func(q, q, q)
    return next(c.backend for c in flash_attn.explain(q, q, q).candidates if c.chosen)


def test_the_switch_switches():
    """fp64 is not served by the CPU's kernels: who serves it is another."""
    q = inputs(torch.float64)[0]
    assert chosen(q) == "torch"
    with flash_attn.use_backend("reference"):
        assert chosen(q) == "reference"
        with flash_attn.use_backend("cpu"), pytest.raises(NotImplementedError, match="cpu.*float64"):
            flash_attn_func(q, q, q)
        with flash_attn.use_backend(None):
            assert chosen(q) == "torch"
        assert chosen(q) == "reference"
    assert chosen(q) == "torch"


def test_the_switch_holds_for_backward_and_operators():
    q = inputs(torch.float64)[0].requires_grad_()
    with flash_attn.backend("reference"):
        out = flash_attn_func(q, q, q)
        torch.ops.flash_attn._flash_attn_forward(
            q.detach(), q.detach(), q.detach(), 0.0, 1.0, False, -1, -1, 0.0, None, False
        )
    out.sum().backward()  # runs where its forward ran
    assert q.grad.abs().sum() > 0


def test_the_switch_is_of_this_thread_of_control():
    q, elsewhere = inputs()[0], []
    with flash_attn.backend("reference"):
        thread = threading.Thread(target=lambda: elsewhere.append(chosen(q)))
        thread.start()
        thread.join()
        assert chosen(q) == "reference"
    assert elsewhere == ["cpu"]


def test_unknown_backend():
    with pytest.raises(ValueError, match="expected one of cpu, reference.*got 'gpu'"):
        with flash_attn.backend("gpu"):
            pass


def test_environment_chooses():
    in_double = CALL.replace("2, 8)", "2, 8, dtype=torch.float64)")
    assert run_python(in_double, FLASH_ATTENTION_BACKEND="reference").stdout == "64.0\n"
    refused = run_python(CALL, FLASH_ATTENTION_BACKEND="abacus").stderr
    assert "FLASH_ATTENTION_BACKEND" in refused and "abacus" in refused


def test_flaggems_is_not_silently_ignored():
    """Asked for and not installed. tests/python/engines/test_flaggems_standin.py has the rest."""
    hidden = (  # also where it is installed
        "import importlib.util as u; find = u.find_spec; "
        "u.find_spec = lambda name, *a: None if name == 'flag_gems' else find(name, *a); "
    )
    refused = run_python(hidden + CALL, FLASH_ATTENTION_USE_FLAGGEMS="TRUE").stderr
    assert "flash_attn.NotServed: FLASH_ATTENTION_USE_FLAGGEMS: flag_gems" in refused
    assert "not installed; install flag_gems (pip install flag_gems)" in refused
    named = run_python(CALL, FLASH_ATTENTION_USE_FLAGGEMS="TRUE", FLASH_ATTENTION_BACKEND="cpu")
    assert named.stdout == "64.0\n"


def test_explain():
    q, k, v = inputs()
    e = flash_attn.explain(q, k, v, causal=True)
    assert "forward" in e.problem and "causal" in e.problem and e.plan
    pairs = sum(min(i + 1 + k.shape[1] - q.shape[1], k.shape[1]) for i in range(q.shape[1]))
    flops = 4 * q.shape[0] * q.shape[2] * q.shape[3] * pairs
    assert e.work.startswith(f"{flops / 1000:.0f} kFLOP, ") and e.work in str(e)
    assert [c.backend for c in e.candidates if c.chosen] == ["cpu"]
    with flash_attn.backend("cpu"):
        e = flash_attn.explain(*inputs(torch.float64))
    assert not any(c.chosen for c in e.candidates) and not e.plan
    assert "float64" in {c.backend: c.why_not for c in e.candidates}["cpu"] and "cpu" in str(e)
    with flash_attn.backend("reference"):
        e = flash_attn.explain(q, k, v, backward=True)
    assert "backward" in e.problem and [c.backend for c in e.candidates if c.chosen] == ["reference"]
    cu = torch.tensor([0, 10, 40], dtype=torch.int32)
    e = flash_attn.explain(q[0], k[0], v[0], cu, cu, 30, 30, backward=True, learnable_sink=torch.zeros(2))
    assert "sink" in str(e)
    with pytest.raises(ValueError, match="k: "):
        flash_attn.explain(q, k[0], v)


def test_import_is_light():
    code = (
        "import sys, torch; before = set(sys.modules); import flash_attn; "
        "print(sorted(m for m in set(sys.modules) - before if not m.startswith('flash_attn')))"
    )
    assert run_python(code).stdout == "[]\n"
