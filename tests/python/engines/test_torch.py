"""The torch engine against the oracle: random problems, then what they do not reach.

Each random problem runs with small blocks too, so that rows and keys come in several, and once more as if its tables
were on a device, where lengths are bounds.
"""

from __future__ import annotations

import contextlib
import os
import sys
from functools import partial
from unittest import mock

import flash_attn
import torch
from flash_attn._engines.torch import TorchEngine
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.compare import assert_as_exact, largest, score_terms
from support.problem import run_engine
from test_property import Problem, functions_of, inputs_of, problems, run, terms_of

FULL = "--full" in sys.argv or os.environ.get("FLASH_ATTN_FULL", "0") not in ("", "0")
ENGINE = TorchEngine()
BLOCKS = sys.modules["flash_attn._engines.torch.blocks"]


@contextlib.contextmanager
def blocks_of(rows: int, keys: int, elements: int = 1 << 23):
    with (
        mock.patch.multiple(BLOCKS, ROWS=rows, KEYS=keys),
        mock.patch.object(BLOCKS.block_sizes, "__defaults__", (elements,)),
    ):
        yield


def arguments_of(p: Problem, on_device: bool) -> dict:
    arguments = {
        "causal": p.causal, "window_size": p.window_size, "softcap": p.softcap, "softmax_scale": p.softmax_scale,
        "dropout_p": p.dropout_p, "on_device": on_device,
    }  # fmt: skip
    if p.alibi:
        shape = (len(p.lengths_q), p.nheads_k * p.group)[2 - p.alibi :]
        arguments["alibi_slopes"] = torch.rand(shape, generator=torch.Generator().manual_seed(p.seed + 1))
    if p.packed:
        cu = [torch.tensor([0, *n]).cumsum(0).to(torch.int32) for n in (p.lengths_q, p.lengths_k)]
        longest = dict(zip(("max_seqlen_q", "max_seqlen_k"), p.longest, strict=True))
        arguments |= {"cu_seqlens_q": cu[0], "cu_seqlens_k": cu[1], **longest}
    torch.manual_seed(p.seed)  # as functions_of does
    return arguments | {"dropout_state": torch.randint(2**63 - 1, (2,))}


def without_state(t) -> None:
    """The seed and the offset are numbers of the Problem then."""
    t.dropout_state = None


def run_on_engine(p: Problem, inputs, dout, dlse, on_device: bool, state: bool) -> dict[str, torch.Tensor]:
    names = {"q": "q", "k": "k", "v": "v", "learnable_sink": "sink", "attn_bias": "bias"}
    mine = {names[name]: x for name, x in inputs.items()}
    got = run_engine(
        ENGINE, dout=dout, dlse=dlse, **mine, **arguments_of(p, on_device), change=id if state else without_state
    )
    return {"out": got["out"], "softmax_lse": got["lse"]} | {"d" + name: got["d" + names[name]] for name in inputs}


@settings(
    max_examples=1000 if FULL else 100, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)  # fmt: skip
@given(
    problems(),
    st.booleans(),
    st.booleans(),
    st.sampled_from([(512, 512), (16, 16), (7, 64)]),
    st.sampled_from([1 << 12, 1 << 23]),
)
def test_agrees_with_the_oracle(p: Problem, on_device: bool, state: bool, blocks, elements):
    inputs, dout, dlse = inputs_of(p)
    function, formula = functions_of(p)
    with blocks_of(*blocks, elements):
        ours = run_on_engine(p, inputs, dout, dlse, on_device, state)
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
        x = x.to(p.dtype) if name.startswith("dlearnable") or name.startswith("dattn") else x
        assert_as_exact(x, exact[name].double(), plain[name], name, scores, terms.get(name, 0), luck=3)
