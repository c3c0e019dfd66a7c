"""A caller's functions of scores as sources of Triton functions: which, why not, and that one text compiles once."""

from __future__ import annotations

import os

import flash_attn
import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    pytest.skip("Triton's interpreter compiles nothing", allow_module_level=True)

import triton  # noqa: E402
from flash_attn._engines.torch.mods import BlockLists, Mods  # noqa: E402
from flash_attn._engines.triton import launch, modified  # noqa: E402
from flash_attn._engines.triton.traced import Untraceable, trace  # noqa: E402
from flash_attn.cute.interface import flash_attn_func  # noqa: E402
from support import engine_problem  # noqa: E402
from support.ahead_of_time import Compiler, device_of  # noqa: E402

CPU = torch.device("cpu")
TABLE, GAIN = torch.randn(4, 90), torch.tensor(0.75)
FIVE = [torch.randn(4) for _ in range(5)]


def of(mod):
    """As the engine has it: with SeqlenInfo last."""
    return lambda *x: mod(*x[:-1])


def function_of(mod, **options):
    return trace("score_mod", of(mod), CPU, **options).function


def test_a_function_that_is_made_anew_is_the_same():
    def made(width):
        return lambda s, b, h, i, j: s * 2 - (i - j) * width

    assert function_of(made(3)) is function_of(made(3))
    assert function_of(made(3)) is not function_of(made(4))
    assert function_of(made(3), gradient=True) is not function_of(made(3))


def test_a_table_is_an_argument():
    """Other numbers and other sizes are the same function."""

    def made(table):
        return lambda s, b, h, i, j: s + table[h, i - j + 45]

    assert function_of(made(TABLE)) is function_of(made(torch.randn(8, 1000)))
    traced = trace("score_mod", of(made(TABLE)), CPU)
    assert len(traced.tables) == 1 and traced.tables[0] is TABLE


def test_the_default_device_and_the_generator_are_the_callers():
    mod = lambda s, b, h, i, j: s * torch.tensor(2.0) + TABLE[h, i - j + 45] * torch.ones(())  # noqa: E731
    known, state = function_of(mod, gradient=True), torch.get_rng_state()
    with torch.device("meta"):
        assert function_of(mod, gradient=True) is known
    assert torch.equal(torch.get_rng_state(), state)


def test_a_table_of_one_sequence_is_looked_up_at_any_position():
    """The numbers that stand for positions while a function is seen may lie outside of it."""
    short = torch.tensor([[3, 4]])
    trace("mask_mod", of(lambda b, h, i, j: short[b, i + 100] == short[0, j - 7]), CPU)


REFUSED = {
    "a branch": (lambda s, b, h, i, j: s if i > j else -s, "ambiguous"),
    "a reduction": (lambda s, b, h, i, j: s.max(), "max is no operation"),
    "a part of a table": (lambda s, b, h, i, j: s + TABLE[h][i], "part of a table|computed"),
    "a table of its own": (lambda s, b, h, i, j: s + (TABLE * 2)[h, i], "make it before the call"),
    "a vector": (lambda s, b, h, i, j: s + TABLE[0], "no number|must match|whole table|one number"),
    "in place": (lambda s, b, h, i, j: s.add_(1), "writes to a number"),
    "a wide result": (lambda s, b, h, i, j: s.double() + i, "float32 is the type of scores"),
    "a huge power": (lambda s, b, h, i, j: s**40, "a power of 40"),
    "a number of Python": (lambda s, b, h, i, j: s * TABLE[0, 0].item(), "no operation|number out of a tensor"),
    "a largest number": (lambda s, b, h, i, j: s * TABLE.max().item(), "number out of a tensor"),
    "a branch on a table": (lambda s, b, h, i, j: s if GAIN > 0.5 else -s, "number out of a tensor"),
    "a list": (lambda s, b, h, i, j: s * GAIN.tolist(), "numbers out of a tensor"),
    "an array": (lambda s, b, h, i, j: s * float(GAIN.numpy()), "numbers out of a tensor"),
    "bytes": (lambda s, b, h, i, j: s + TABLE.byte()[h, i], "computed|table of uint8"),
    "many tables": (lambda s, b, h, i, j: s + sum(x[h] for x in FIVE), "more than 4 tables"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_kernel_takes(name):
    mod, words = REFUSED[name]
    with pytest.raises(Untraceable, match=words):
        function_of(mod)


def test_what_no_kernel_takes_of_a_call():
    q = torch.randn(1, 8, 2, 16)
    mods = Mods(score_mod=of(lambda s, b, h, i, j: s))
    with pytest.raises(Untraceable, match="q is float64"):
        modified.lower(mods, q.double(), q, False)
    with pytest.raises(Untraceable, match="headdim is above 512"):
        modified.lower(mods, torch.randn(1, 8, 2, 520), q, False)
    blocks = BlockLists(torch.ones(1, 1, 1, 1, dtype=torch.uint8), (24, 16))
    with pytest.raises(Untraceable, match="no multiples of 16"):
        modified.lower(Mods(blocks=blocks), q, q, False)
    reads = torch.randn(4, requires_grad=True)
    mods = Mods(score_mod=of(lambda s, b, h, i, j: s + reads[h]))
    for gradient in (False, True):
        with pytest.raises(Untraceable, match="a gradient of a tensor that it reads"):
            modified.lower(mods, q, q, gradient)
        with torch.no_grad():
            tables = modified.lower(mods, q, q, gradient).tables
            assert len(tables) == 1 and tables[0] is reads


def test_a_call_that_names_triton_says_why_not():
    q = torch.randn(1, 8, 2, 16)
    with flash_attn.use_backend("triton"), pytest.raises(flash_attn.NotServed, match="it runs on GPUs, got cpu"):
        flash_attn_func(q, q, q, score_mod=lambda s, b, h, i, j: s * 2)
    with flash_attn.use_backend("cpu"), pytest.raises(flash_attn.NotServed, match="cpu was asked for by name"):
        flash_attn_func(q, q, q, score_mod=lambda s, b, h, i, j: s * 2)


@pytest.mark.parametrize(("target", "headdim"), [("90", 128), ("80", 64), ("gfx942", 64)])
def test_kernels_compile(monkeypatch, target, headdim):
    table = torch.randn(8, 2100)
    mods = Mods(
        score_mod=of(
            lambda s, b, h, i, j: (
                2 * torch.tanh(s * 0.5).clamp(-0.9, 0.9) + table[h, i - j + 1030] + (j % 0.3) * ((i ^ 0x9E3779B9) & 1)
            )
        ),
        mask_mod=of(lambda b, h, i, j: j <= i),
    )
    gpu, device = device_of(target)
    compiler = Compiler(gpu)
    monkeypatch.setattr(launch.Kernel, "__call__", lambda *a: compiler(*a))
    q = torch.empty(2, 1024, 8, headdim, dtype=torch.bfloat16)
    k = torch.empty(2, 1024, 4, headdim, dtype=torch.bfloat16)
    p, t = engine_problem.make(q, k, k, poison=False)
    t.mods = modified.lower(mods, q, k, True)
    modified.run_forward(p, t, device, 0, triton.__version__)
    backward = engine_problem.make_backward(p, t, torch.empty_like(t.out))
    modified.run_backward(*backward, device, 0, triton.__version__)
    assert len(compiler.compiled) == 3
    for name, kernel in compiler.compiled:
        assert kernel.metadata.shared <= device.shared, name
