"""The package in an interpreter that has no torch: what works there gives the same bits, and what does not says so."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import flash_attn
import numpy as np
import pytest
import torch

# A finder in the place of Python's own that finds everything but torch: as if it were not installed.
NO_TORCH = """
import sys
from importlib.machinery import PathFinder

class WithoutTorch:
    @staticmethod
    def find_spec(name, path=None, target=None):
        return None if name.partition(".")[0] == "torch" else PathFinder.find_spec(name, path, target)

sys.meta_path[:] = [WithoutTorch if finder is PathFinder else finder for finder in sys.meta_path]
"""


def run(program: str, *arguments) -> str:
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(p for p in sys.path if p))
    environment.pop("FLASH_ATTENTION_BACKEND", None)
    command = [sys.executable, "-c", NO_TORCH + program + "\nassert 'torch' not in sys.modules", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_block_blocks() -> None:
    run(
        "try:\n    import torch\nexcept ModuleNotFoundError as e:\n    assert e.name == 'torch'\n"
        "else:\n    raise SystemExit(1)"
    )


ALL_KINDS = """
import numpy as np
import flash_attn

data = np.load(sys.argv[1])
q, k, v, dout, bias, sink, cu = (data[n] for n in ("q", "k", "v", "dout", "bias", "sink", "cu"))
results = {}

def both(name, *inputs, dout, **options):
    out, lse = flash_attn.attention(*inputs, return_lse=True, **options)
    results[name + "out"], results[name + "lse"] = out, lse
    for field, g in flash_attn.attention_backward(dout, *inputs, out, lse, **options)._asdict().items():
        if g is not None:
            results[name + field] = g

both("fixed ", q, k, v, dout=dout, causal=True, softcap=5.0)
both("extras ", q, k, v, dout=dout, bias=bias, sink=sink, window_size=(3, 3))
half = [x.astype(np.float16) for x in (q, k, v, dout)]
both("half ", *half[:3], dout=half[3])
packed = [x.reshape(-1, *x.shape[2:]) for x in (q, k, v, dout)]
both("varlen ", *packed[:3], dout=packed[3], cu_seqlens_q=cu, cu_seqlens_k=cu, causal=True)
assert {type(x) for x in results.values()} == {np.ndarray}
np.savez(sys.argv[2], **results)
"""


def test_numpy_gives_the_bits_that_torch_gives(tmp_path: Path) -> None:
    q, k, v, dout = (torch.randn(2, 9, h, 16) for h in (4, 2, 2, 4))
    bias, sink = torch.randn(1, 1, 9, 9), torch.randn(4)
    cu = torch.tensor([0, 4, 4, 17], dtype=torch.int32)  # and a row of no sequence
    given = {"q": q, "k": k, "v": v, "dout": dout, "bias": bias, "sink": sink, "cu": cu}
    np.savez(tmp_path / "given.npz", **{name: x.numpy() for name, x in given.items()})
    run(ALL_KINDS, tmp_path / "given.npz", tmp_path / "results.npz")
    results = dict(np.load(tmp_path / "results.npz"))

    def check(name, *inputs, dout, **options):
        leaves = [x.clone().requires_grad_() for x in inputs]
        extras = {n: options[n].clone().requires_grad_() for n in ("bias", "sink") if n in options}
        out, lse = flash_attn.attention(*leaves, return_lse=True, **(options | extras))
        grads = torch.autograd.grad(out, [*leaves, *extras.values()], dout)
        names = ["dq", "dk", "dv", *("d" + n for n in extras)]
        for field, x in zip(["out", "lse", *names], [out, lse, *grads], strict=True):
            assert np.array_equal(results.pop(name + field), x.detach().numpy()), name + field

    check("fixed ", q, k, v, dout=dout, causal=True, softcap=5.0)
    check("extras ", q, k, v, dout=dout, bias=bias, sink=sink, window_size=(3, 3))
    check("half ", *(x.half() for x in (q, k, v)), dout=dout.half())
    packed = [x.flatten(0, 1) for x in (q, k, v, dout)]
    check("varlen ", *packed[:3], dout=packed[3], cu_seqlens_q=cu, cu_seqlens_k=cu, causal=True)
    assert not results


def test_bfloat16() -> None:
    pytest.importorskip("ml_dtypes")
    run(
        "import numpy as np, ml_dtypes, flash_attn\n"
        "x = np.ones((1, 3, 2, 8), ml_dtypes.bfloat16)\n"
        "out = flash_attn.attention(x, x, 2 * x, causal=True)\n"
        "assert out.dtype == ml_dtypes.bfloat16 and (out == 2).all()"
    )


def test_jax() -> None:
    if importlib.util.find_spec("jax") is None:
        pytest.skip("jax is not installed")
    run(
        "import jax, flash_attn\n"
        "x = jax.numpy.ones((1, 3, 2, 8))\n"
        "loss = lambda v: flash_attn.jax.attention(x, x, v, causal=True).sum()\n"
        "value, gradient = jax.jit(jax.value_and_grad(loss))(2 * x)\n"
        "assert value == 96 and abs(gradient.sum() - 48) < 1e-4, (value, gradient.sum())"
    )


def test_what_needs_torch_says_so() -> None:
    printed = run("""
import flash_attn

class OnDevice:
    def __dlpack__(self, **_): raise AssertionError
    def __dlpack_device__(self): return (2, 0)

def words(call):
    try:
        call()
    except Exception as e:
        print(type(e).__name__, str(e).splitlines()[0])
    else:
        print("nothing")

def from_import():
    from flash_attn import flash_attn_varlen_func

words(lambda: flash_attn.flash_attn_func)
words(from_import)
words(lambda: __import__("flash_attn.bert_padding"))
words(lambda: flash_attn.no_such_name)
words(lambda: flash_attn.attention(OnDevice(), OnDevice(), OnDevice()))
with flash_attn.use_backend("torch"):
    import numpy as np
    x = np.zeros((1, 2, 2, 8), np.float32)
    words(lambda: flash_attn.attention(x, x, x))
""").splitlines()
    for line, expected in zip(
        printed,
        (
            "ModuleNotFoundError flash_attn.flash_attn_func is made for torch.Tensor, and torch is not installed: pip",
            "ModuleNotFoundError flash_attn.flash_attn_varlen_func is made for torch.Tensor, and torch is not",
            "ModuleNotFoundError No module named 'torch'",
            "AttributeError module 'flash_attn' has no attribute 'no_such_name'",
            "NotServed q: arrays on a device are served by engines written in PyTorch, which is not installed; pip",
            'NotServed backend "torch"',
        ),
        strict=True,
    ):
        assert line.startswith(expected)


def test_every_public_name_is_there_or_needs_torch() -> None:
    printed = run(
        "import flash_attn\nfrom flash_attn import *\n"
        "print(*sorted(set(flash_attn.__all__)), sep=',')\n"
        "print([b.name for b in flash_attn.backends() if not b.unavailable])\n"
        "x = __import__('numpy').ones((1, 2, 1, 8))\n"
        "with use_backend('reference'):\n    print(attention(x, x, x).dtype)"
    )
    names, usable, dtype = printed.splitlines()
    lost = set(flash_attn.__all__) - set(names.split(","))
    assert set(names.split(",")) <= set(flash_attn.__all__) and "attention" in names and "use_backend" in names
    assert {n for n in lost if not n.startswith("flash_attn_")} <= {
        "Candidate",
        "Explanation",
        "explain",
        "check_tables",
    }
    assert usable == "['cpu', 'reference']" and dtype == "float64"


@pytest.mark.parametrize("program", ["verify", "tune"])
def test_programs_that_need_torch_say_so(program) -> None:
    run(f"""
import runpy
try:
    runpy.run_module("flash_attn.{program}", run_name="__main__")
except SystemExit as e:
    assert str(e) == "{program}: needs PyTorch, which is not installed: pip install 'torch>=2.4'", e
else:
    raise AssertionError("it ran")
""")
