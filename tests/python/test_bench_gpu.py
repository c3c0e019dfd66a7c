"""benchmarks/gpu, on the CPU: whether the program runs, and says what it measured and what it could not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu"
KEYS = {
    "name", "impl", "dtype", "batch", "nheads_q", "nheads_k", "seqlen_q", "seqlen", "headdim", "causal", "varlen",
    "graph", "of_ceiling", "device", "error",
}  # fmt: skip


def run(*arguments: str) -> subprocess.CompletedProcess:
    call = [sys.executable, str(PROGRAM), "--device", "cpu", "--rounds", "2", *arguments]
    return subprocess.run(call, capture_output=True, text=True)


def test_measures_and_records(tmp_path):
    file = tmp_path / "records.json"
    done = run("--json", str(file))
    assert done.returncode == 0, done.stderr
    header, *records = json.loads(file.read_text())
    assert header["name"] == "header" and header["commit"] and header["versions"]["torch"]
    assert header["absent"]["torch_cudnn"] == "needs an accelerator" and header["skipped"] == []
    assert {r["name"] for r in records} == {"forward", "backward", "decode"}
    for r in records:
        assert set(r) >= KEYS and ("tbs" in r) == (r["name"] == "decode")
        rate = r.get("tbs", r.get("tflops"))
        if r["impl"] == "plus":
            assert r["backend"] == ("torch" if r["mod"] else "cpu") and r["error"] is None
        assert (rate is None) == (r["error"] is not None)
        if rate:
            assert r["of_ceiling"] == pytest.approx(rate / r["ceiling"]) and rate > 0
    paged = {r["impl"] for r in records if r["page_size"]}
    assert paged == {"plus", "plus_unpaged"}
    failed = [r for r in records if r["error"]]
    assert {r["error"] for r in failed} == {
        "PyTorch's packed FlashAttention-2 has no grouped heads",
        "no option says the same",
    }
    assert "torch_fa2: PyTorch's packed FlashAttention-2 has no grouped heads" in done.stdout


def test_stops_when_time_is_up(tmp_path):
    file = tmp_path / "records.json"
    done = run("--seconds", "0", "--json", str(file))
    header, *records = json.loads(file.read_text())
    assert done.returncode == 1 and not records and len(header["skipped"]) == 16
    assert "out of time" in done.stdout


def test_a_wrong_answer_wins_no_race():
    code = f"""
import sys
sys.path.insert(0, {str(PROGRAM)!r})
import argparse, torch, __main__ as _
import importlib.util
spec = importlib.util.spec_from_file_location("bench_gpu", {str(PROGRAM / "__main__.py")!r})
m = importlib.util.module_from_spec(spec); spec.loader.exec_module(m)
args = argparse.Namespace(device="cpu", dtype="bf16", backends=["auto"], peers=["torch_fa2"], rounds=1, graph=False,
                          commit="")
bench = m.Bench(args)
right = bench.contenders[0].make
object.__setattr__(bench.contenders[0], "make", lambda c, x: lambda q, k, v: right(c, x)(q, k, v) * 1.1)
for r in bench.measure(m.TINY[0]):
    print(r["impl"], r["error"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "plus wrong answer" in done.stdout and "torch_fa2 None" in done.stdout, done.stderr


def test_the_table_is_the_one_of_the_anchors(monkeypatch):
    monkeypatch.syspath_prepend(str(PROGRAM))
    from cells import DECODE, TABLE, VARLEN

    assert len(TABLE) == 72 and len(DECODE) == 8
    assert all(c.batch * c.seqlen == 16384 and c.nheads * c.headdim == 2048 for c in TABLE)
    assert all(sum(c.lengths) == 16384 and min(c.lengths) > 0 for c in VARLEN)
    forward = next(c for c in TABLE if (c.seqlen, c.headdim, c.causal, c.name) == (8192, 128, True, "forward"))
    assert forward.flops == 4 * 2 * 16 * 8192**2 * 128 / 2
