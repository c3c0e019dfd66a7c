"""`python -m flash_attn.verify` on the CPU: right backends pass, wrong ones do not, and features all have a case."""

from __future__ import annotations

import json
import subprocess
import sys

import flash_attn
import pytest
import torch
from flash_attn import verify
from flash_attn._engines.torch import TorchEngine
from flash_attn._verify.cases import CASES, LARGE
from flash_attn._verify.instance import Instance, draw

NAME = "under judgement"


@pytest.fixture
def register():
    """A backend for the CPU made of the torch engine, whose results pass through `change` by name."""

    def add(change=lambda name, x: None, serves=None, failure=None):
        class Changed(TorchEngine):
            def forward(self, p, t):
                if failure:
                    raise failure
                super().forward(p, t)
                change("out", t.out)
                change("lse", t.lse)
                if t.new_k is not None:
                    change("k_cache", t.k)

            def backward(self, p, t):
                super().backward(p, t)
                for name in ("dq", "dk", "dv", "dbias", "dsink"):
                    change(name, getattr(t, name))

        every = flash_attn.features()
        serves = every if serves is None else serves
        dtypes = ("float16", "bfloat16", "float32")
        flash_attn.register_backend(NAME, Changed(), devices=("cpu",), dtypes=dtypes, serves=serves, backward=serves)

    yield add
    flash_attn.unregister_backend(NAME)


SAMPLE = {
    "headdim 64 causal",
    "varlen with spare rows",
    "bias (b, h, i, j)",
    "everything",
    "cache: pages of 16, rotary",
}


@pytest.fixture
def sample(monkeypatch):
    cases = tuple(c for c in CASES if c.name in SAMPLE)
    assert len(cases) == len(SAMPLE)
    monkeypatch.setattr(verify, "CASES", cases)


def test_every_backend_of_the_cpu_passes(sample, tmp_path, capsys):
    assert verify.main(["--device", "cpu", "--json", str(tmp_path / "outcomes.json")]) == 0
    outcomes = json.loads((tmp_path / "outcomes.json").read_text())
    seen = {(o["backend"], o["dtype"], o["direction"]) for o in outcomes}
    assert {("cpu", "bf16", "forward"), ("torch", "fp16", "backward"), ("torch", "fp64", "backward")} <= seen
    cache = [o for o in outcomes if o["feature"].startswith("cache")]
    assert cache and all(set(o["judged"]) == {"out", "lse", "k_cache", "v_cache"} for o in cache)
    printed = capsys.readouterr().out
    assert "FAILED," not in printed and "of its bound" in printed and "everything  " not in printed


def off_by(relative):
    def change(which):
        def at(name, x):
            if name == which and x is not None and x.numel():
                x.view(-1)[x.isfinite().flatten().nonzero()[-1]] += relative * x[x.isfinite()].abs().max()

        return at

    return change


@pytest.mark.parametrize("dtype, relative", [("bf16", 0.03), ("fp32", 1e-4)])
@pytest.mark.parametrize("which", ["out", "lse", "k_cache", "dq", "dk", "dv", "dbias", "dsink"])
def test_one_wrong_number_fails(which, dtype, relative, sample, register, capsys):
    register(off_by(relative)(which))
    assert verify.main(["--device", "cpu", "--backend", NAME, "--dtype", dtype]) == 1
    assert f"FAILED: {which}: error" in capsys.readouterr().out


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_nobody_wrote_fails(value, sample, register):
    register(lambda name, x: x.view(-1)[-1:].fill_(value) if name == "out" else None)
    assert verify.main(["--device", "cpu", "--backend", NAME, "--dtype", "fp32", "--filter", "spare"]) == 1


def test_an_exception_is_a_failure_and_a_refusal_is_not(sample, register, capsys):
    register(failure=ValueError("the kernel did not compile"))
    assert verify.main(["--device", "cpu", "--backend", NAME, "--dtype", "fp32"]) == 1
    assert "FAILED: ValueError: the kernel did not compile" in capsys.readouterr().out
    flash_attn.unregister_backend(NAME)
    register(serves=[f for f in flash_attn.features() if "bias" not in f])
    assert verify.main(["--device", "cpu", "--backend", NAME, "--dtype", "fp32", "-v"]) == 0
    printed = capsys.readouterr().out
    assert "refused: " in printed and "bias" in printed and "ok, " in printed


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--backend", "warp"], "expected one of .*cpu"),
        (["--filter", "no such feature"], "no feature contains"),
        (["--device", "xpu", "--backend", "cpu"], "does not serve xpu"),
    ],
)
def test_says_what_is_wrong_with_the_options(arguments, words):
    with pytest.raises(SystemExit, match=words):
        verify.main(["--device", "cpu", *arguments])


def test_runs_as_a_module(tmp_path):
    """And finds the same in processes of its own."""
    found = []
    for jobs in ("1", "2"):
        to = tmp_path / jobs
        call = [sys.executable, "-m", "flash_attn.verify", "--device", "cpu", "--filter", "1 x", "--dtype", "fp32"]
        done = subprocess.run([*call, "--jobs", jobs, "--json", to], capture_output=True, text=True)
        assert done.returncode == 0 and "within the bound" in done.stdout, done.stderr
        found.append(json.loads(to.read_text()))
    assert found[0] == found[1] and len(found[0]) > 6


def test_the_table_uses_every_feature(register):
    """Whatever a Problem may use, forward and backward, some case uses: a new feature needs a case."""
    used = {"forward": set(), "backward": set()}

    class Notes(TorchEngine):
        def forward(self, p, t):
            used["forward"] |= {name for name in flash_attn.features() if p.uses(name)}
            super().forward(p, t)

        def backward(self, p, t):
            used["backward"] |= {name for name in flash_attn.features() if p.uses(name)}
            super().backward(p, t)

    every = flash_attn.features()
    flash_attn.register_backend(
        NAME, Notes(), devices=("cpu",), dtypes=("float32",), serves=every, backward=every, automatic=False
    )
    for case in CASES:
        instance = Instance(case, draw(case, torch.float32, 0), torch.float32, "cpu")
        instance.forward(NAME)
        if case.differentiable:
            instance.backward(NAME)
    assert set(every) == used["forward"] | used["backward"]
    cache_only = {"pages", "cache_batch_idx", "new_keys", "rotary"}  # which has no gradient
    assert set(every) - used["backward"] - cache_only <= {"lse"}  # which is an input there


def test_names_are_distinct():
    names = [c.name for c in (*CASES, *LARGE)]
    assert len(set(names)) == len(names)
