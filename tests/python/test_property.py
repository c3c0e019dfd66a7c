"""Random problems against the oracle: 300 of them, or 2000 with --full (or FLASH_ATTN_FULL=1).

Each is one call of a public function, forward and backward (through out and lse), on the backend that the package
chooses by itself, and on the oracle with the same values in fp64, which drops the same entries. The yardstick is that
of the other tests: the plain PyTorch arithmetic, three times its error here: among thousands of problems, some of a
handful of numbers, there are those in which the plain arithmetic is lucky (about one result in 700 errs by more than
the plain one). About the CPU: tests/device/random_problems.py tries them on a device, where each compiles kernels.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from functools import partial

import flash_attn
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import device
from support.compare import assert_as_exact, cancelling_terms, dot_terms, largest, score_terms
from support.formula import attention, attention_varlen

FULL = "--full" in sys.argv or os.environ.get("FLASH_ATTN_FULL", "0") not in ("", "0")
EXAMPLES = 2000 if FULL else 300

HEADDIMS = st.one_of(st.integers(1, 40), st.sampled_from([59, 64, 80, 96, 111, 128, 200, 256]))
LENGTHS = st.one_of(st.integers(0, 20), st.integers(0, 70), st.sampled_from([1, 16, 48, 64, 128, 192, 193, 257]))
LAYOUTS = ["contiguous", "heads first", "columns strided", "rows strided"]


@dataclass(frozen=True)
class Problem:
    packed: bool  # sequences one after another (varlen), else (batch, seqlen, ...)
    lengths_q: tuple[int, ...]
    lengths_k: tuple[int, ...]
    tail: int  # rows after the last sequence
    nheads_k: int
    group: int
    headdim: int
    dtype: torch.dtype
    layouts: tuple[str, str, str]
    causal: bool
    window_size: tuple[int, int]
    softcap: float
    softmax_scale: float | None
    alibi: int  # 0: none, 1: (nheads), 2: (batch, nheads)
    sink: bool
    # "full": (batch, nheads, seqlen_q, seqlen_k); "mask": such, with -inf; "rows alike": (1, nheads, 1, seqlen_k); ""
    bias: str
    dropout_p: float
    seed: int

    @property
    def longest(self) -> tuple[int, int]:
        return max(self.lengths_q, default=5), max(self.lengths_k, default=7)


@st.composite
def problems(draw) -> Problem:
    packed = draw(st.booleans())
    batch = draw(st.integers(1 if packed else 0, 3))
    if packed:
        lengths = [tuple(draw(LENGTHS) for _ in range(batch)) for _ in range(2)]
    else:
        lengths = [(draw(LENGTHS),) * batch for _ in range(2)]
    window = st.one_of(st.just(-1), st.integers(0, 40), st.integers(0, 300))
    return Problem(
        packed=packed,
        lengths_q=lengths[0],
        lengths_k=lengths[1],
        tail=draw(st.sampled_from([0, 0, 3])) if packed else 0,
        nheads_k=draw(st.integers(1, 2)),
        group=draw(st.integers(1, 3)),
        headdim=draw(HEADDIMS),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
        layouts=tuple(draw(st.sampled_from(LAYOUTS)) for _ in range(3)),
        causal=draw(st.booleans()),
        window_size=(draw(window), draw(window)),
        softcap=draw(st.sampled_from([0.0, 0.0, 1.0, 20.0])),
        softmax_scale=draw(st.sampled_from([None, None, 0.05, 1.0])),
        alibi=draw(st.sampled_from([0, 0, 1, 2])),
        sink=draw(st.sampled_from([False, False, True])),
        bias=draw(st.sampled_from(["", "", "", "full", "rows alike", "mask"])) if batch else "",
        dropout_p=draw(st.sampled_from([0.0, 0.0, 0.0, 0.125, 0.5])),
        seed=draw(st.integers(0, 2**31 - 1)),
    )


def laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values with other strides."""
    if layout == "heads first":
        return x.transpose(-3, -2).contiguous().transpose(-3, -2)
    if layout == "columns strided":
        return torch.stack([x, x], -1)[..., 0]
    if layout == "rows strided":
        return torch.stack([x, x], -3)[..., 0, :, :]
    return x


def bias_of(p: Problem, g: torch.Generator) -> torch.Tensor:
    shape = (len(p.lengths_q), p.nheads_k * p.group, *p.longest)
    if p.bias == "rows alike":
        shape = (1, shape[1], 1, shape[3])
    bias = torch.randn(shape, generator=g)
    return bias.masked_fill(bias < 0.5, -torch.inf) if p.bias == "mask" else bias


def inputs_of(p: Problem):
    """-> {name: q, k, v, and a sink and a bias}, dout, dlse."""
    g = torch.Generator().manual_seed(p.seed)
    nheads, batch = p.nheads_k * p.group, len(p.lengths_q)
    if p.packed:
        rows = [(sum(p.lengths_q) + p.tail,), (sum(p.lengths_k) + p.tail,)]
    else:
        rows = [(batch, n) for n in p.longest]
    shapes = [(*rows[i], h, p.headdim) for i, h in ((0, nheads), (1, p.nheads_k), (1, p.nheads_k))]
    tensors = [laid_out(torch.randn(s, generator=g).to(p.dtype), at) for s, at in zip(shapes, p.layouts, strict=True)]
    dout = torch.randn(shapes[0], generator=g).to(p.dtype)
    dlse = torch.randn((nheads, *rows[0]) if p.packed else (batch, nheads, rows[0][1]), generator=g)
    inputs = dict(zip("qkv", tensors, strict=True))
    if p.sink:
        inputs["learnable_sink"] = torch.randn(nheads, generator=g).to(p.dtype)
    if p.bias:
        inputs["attn_bias"] = bias_of(p, g).to(p.dtype)
    return inputs, dout, dlse


def functions_of(p: Problem):
    """-> the public function, which returns S_dmask too, and the formula."""
    options = {
        "causal": p.causal,
        "window_size": p.window_size,
        "softcap": p.softcap,
        "softmax_scale": p.softmax_scale,
    }
    if p.alibi:
        shape = (len(p.lengths_q), p.nheads_k * p.group)[2 - p.alibi :]
        options["alibi_slopes"] = torch.rand(shape, generator=torch.Generator().manual_seed(p.seed + 1))
    rest, function, formula = (), device.flash_attn_func, attention
    if p.packed:
        cu = [torch.tensor([0, *n]).cumsum(0).to(torch.int32) for n in (p.lengths_q, p.lengths_k)]
        rest, function = (*cu, *p.longest), device.flash_attn_varlen_func
        formula = partial(attention_varlen, cu_seqlens_q=cu[0], cu_seqlens_k=cu[1])

    def ours(q, k, v, **extra):
        torch.manual_seed(p.seed)
        return function(q, k, v, *rest, dropout_p=p.dropout_p, return_attn_probs=True, **options, **extra)

    return ours, partial(formula, dtype=p.dtype, **options)


def run(function, inputs, dout, dlse):
    """-> {name: out, softmax_lse, the gradients}, and what else the function returns."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    out, lse, *more = function(**leaves)
    gradients = torch.autograd.grad((out, lse), leaves.values(), (dout.to(out.dtype), dlse.to(lse.dtype)))
    names = ["out", "softmax_lse", *("d" + name for name in leaves)]
    return dict(zip(names, (out.detach(), lse.detach(), *gradients), strict=True)), more


def terms_of(p: Problem, inputs, dout) -> dict[str, float]:
    """For the results that are sums of what may cancel: the size of that, in roundings in fp32.

    dout.out is made of the out that was written, in 16 bits. The gradient of a sink is a sum of it; with dropout, or a
    sink, a row of one key has gradients of almost 0 that are a difference of it. The plain arithmetic comes to them
    without that rounding.
    """
    q, k, v = (inputs[name] for name in "qkv")
    kept = dout / (1 - p.dropout_p)
    scores, dots = cancelling_terms(q, k, v, kept, p.softmax_scale), dot_terms(v, kept)
    many = (sum(p.lengths_q) * p.group) ** 0.5  # rows that see a key, whose errors add up as random ones do
    written = max(1, torch.finfo(p.dtype).eps / 2 / torch.finfo(torch.float32).eps)
    each = written if p.dropout_p or p.sink else 1
    return {
        "dq": scores * each,
        "dk": scores * each * max(1, many / 4),
        "dv": largest(kept) * many,
        "dattn_bias": dots * each * (many if p.bias == "rows alike" else 1),
        "dlearnable_sink": dots * written * many,
    }


@settings(
    max_examples=EXAMPLES, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)  # fmt: skip
@given(problems())
def test_agrees_with_the_oracle(p: Problem):
    inputs, dout, dlse = inputs_of(p)
    function, formula = functions_of(p)
    ours, _ = run(function, inputs, dout, dlse)
    with flash_attn.backend("reference"):
        exact, (S_dmask, *_) = run(function, {n: x.double() for n, x in inputs.items()}, dout, dlse)
    if p.dropout_p:  # its sign tells what is dropped
        dropped = torch.signbit(S_dmask[..., : p.longest[0], : p.longest[1]])
        formula = partial(formula, dropout=(~dropped).float() / (1 - p.dropout_p))
    plain, _ = run(formula, inputs, dout, dlse)
    scores = max(largest(exact["softmax_lse"]), score_terms(inputs["q"], inputs["k"], p.softmax_scale))
    if p.bias:
        scores += largest(inputs["attn_bias"])
    terms = terms_of(p, inputs, dout)
    for name, x in ours.items():
        assert_as_exact(x, exact[name].double(), plain[name], name, scores, terms.get(name, 0), luck=3)
