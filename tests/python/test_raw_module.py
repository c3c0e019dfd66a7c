"""`import flash_attn_2_cuda`: upstream's compiled module by its name, with its functions' positional orders."""

from __future__ import annotations

import inspect
import subprocess
import sys

import flash_attn_2_cuda as raw
import pytest
import torch
from flash_attn import flash_attn_func
from flash_attn import flash_attn_interface as interface

MASK = "is_causal, window_size_left, window_size_right, softcap"
ORDERS = {
    "fwd": f"q, k, v, out, alibi_slopes, p_dropout, softmax_scale, {MASK}, return_softmax, gen",
    "varlen_fwd": (
        "q, k, v, out, cu_seqlens_q, cu_seqlens_k, seqused_k, leftpad_k, block_table, alibi_slopes, max_seqlen_q, "
        f"max_seqlen_k, p_dropout, softmax_scale, zero_tensors, {MASK}, return_softmax, gen, num_splits"
    ),
    "bwd": (
        f"dout, q, k, v, out, softmax_lse, dq, dk, dv, alibi_slopes, p_dropout, softmax_scale, {MASK}, deterministic, "
        "gen, rng_state"
    ),
    "varlen_bwd": (
        "dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, alibi_slopes, max_seqlen_q, "
        f"max_seqlen_k, p_dropout, softmax_scale, zero_tensors, {MASK}, deterministic, gen, rng_state"
    ),
    "fwd_kvcache": (
        "q, kcache, vcache, k, v, seqlens_k, rotary_cos, rotary_sin, cache_batch_idx, leftpad_k, block_table, "
        f"alibi_slopes, out, softmax_scale, {MASK}, is_rotary_interleaved, num_splits"
    ),
}
# Of v2.8.3; the numbers of arguments that its callers give by position.
COUNTS = {"fwd": 13, "varlen_fwd": 21, "bwd": 19, "varlen_bwd": 24, "fwd_kvcache": 20}


@pytest.mark.parametrize("name", ORDERS)
def test_upstreams_order(name):
    parameters = list(inspect.signature(getattr(raw, name)).parameters.values())
    assert ", ".join(p.name for p in parameters) == ORDERS[name]
    assert sum(p.default is p.empty for p in parameters) == COUNTS[name]
    assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)


def test_is_the_raw_module():
    assert sorted(raw.__all__) == sorted(ORDERS)
    for name in ORDERS:
        assert getattr(raw, name) is getattr(interface.flash_attn_gpu, name)


def test_may_be_imported_first():
    code = "from flash_attn_2_cuda import varlen_bwd; import flash_attn; print(varlen_bwd.__module__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "flash_attn._flash_attn_gpu\n", done.stderr


def test_computes():
    q, k, v = (torch.randn(2, 9, heads, 16) for heads in (4, 2, 2))
    out, lse, S_dmask, rng_state = raw.fwd(q, k, v, None, None, 0.0, 0.25, True, -1, 0, 0.0, False, None)
    want, want_lse, _ = flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    assert torch.equal(out, want) and torch.equal(lse, want_lse)
