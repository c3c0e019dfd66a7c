"""The torch engine and tables: every way to say where sequences are, against each sequence cut out by hand.

In fp64, so that what differs is a meaning and not a rounding. `on_device`: as if nobody had read the tables.
"""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.per_sequence import attend, places
from support.problem import run_engine

from .test_torch import ENGINE, FULL, blocks_of


@st.composite
def tables(draw) -> dict:
    """-> arguments of make_problem."""
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31 - 1)))

    def normal(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64)

    def up_to(most):  # (batch) int32, each at most its entry of `most`
        return torch.tensor([draw(st.integers(0, int(n))) for n in most], dtype=torch.int32)

    def cumulative(lengths):
        return torch.tensor([0, *lengths.tolist()]).cumsum(0).to(torch.int32)

    batch, nheads_k, group = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    headdim, headdim_v = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    length = st.integers(0, 40)
    a = {}
    rows_q = torch.full((batch,), draw(length))
    if draw(st.booleans()):
        rows_q = up_to([40] * batch)
        a["cu_seqlens_q"] = cumulative(rows_q)
        a["q"] = normal(int(rows_q.sum()) + draw(st.integers(0, 2)), nheads_k * group, headdim)
    else:
        a["q"] = normal(batch, int(rows_q[0]), nheads_k * group, headdim)
    if draw(st.booleans()):
        a["seqused_q"] = up_to(rows_q)

    layout = draw(st.sampled_from(["fixed", "entries", "packed", "pages"]))
    if layout == "packed":
        rows_k = up_to([40] * batch)
        a["cu_seqlens_k"] = cumulative(rows_k)
        shape = (int(rows_k.sum()) + draw(st.integers(0, 2)),)
    elif layout == "pages":
        size, each = draw(st.integers(1, 20)), draw(st.integers(0, 4))
        rows_k = torch.full((batch,), size * each)
        shape = (batch * each + 1, size)
        a["block_table"] = (
            torch.randperm(batch * each + 1, generator=g)[: batch * each].view(batch, each).to(torch.int32)
        )
    else:
        rows_k = torch.full((batch,), draw(length))
        shape = (batch + 2 * (layout == "entries"), int(rows_k[0]))
        if layout == "entries":
            a["cache_batch_idx"] = torch.randperm(batch + 2, generator=g)[:batch].to(torch.int32)
    a["k"], a["v"] = normal(*shape, nheads_k, headdim), normal(*shape, nheads_k, headdim_v)
    used = draw(st.sampled_from(["all", "table", "int"]))
    if used == "table":
        a["seqused_k"] = rows_k = up_to(rows_k)
    elif used == "int":
        a["used_k"] = draw(st.integers(0, int(rows_k.min())))
        rows_k = torch.full((batch,), a["used_k"])
    if draw(st.booleans()):
        a["leftpad_k"] = up_to(rows_k)

    window = st.one_of(st.just(-1), st.integers(0, 30))
    a |= {
        "softcap": draw(st.sampled_from([0.0, 2.0])), "max_seqlen_q": 40,
        "max_seqlen_k": 40 if layout == "packed" else None,
    }  # fmt: skip
    if draw(st.booleans()):
        a |= {"causal": draw(st.booleans()), "window_size": (draw(window), draw(window))}
        a["chunk"] = draw(st.sampled_from([0, 0, 5, 16]))
    if draw(st.booleans()):
        a["sink"] = normal(nheads_k * group)
    if draw(st.booleans()):
        slopes = torch.rand(nheads_k * group, generator=g)
        a["alibi_slopes"] = slopes if draw(st.booleans()) else slopes.repeat(batch, 1)
    if draw(st.booleans()):
        most = 40 if "cu_seqlens_q" in a else a["q"].shape[1]
        keys = 40 if layout == "packed" else a["block_table"].shape[1] * shape[1] if layout == "pages" else shape[1]
        of_batch, of_heads, of_rows = (draw(st.booleans()) for _ in range(3))
        bias = normal(batch if of_batch else 1, nheads_k * group if of_heads else 1, most if of_rows else 1, keys)
        bias = bias.masked_fill(bias < draw(st.sampled_from([-9.0, 0.0])), -torch.inf)
        a["bias"] = bias.to(draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16])))
    return a


def poison(a: dict, gradients: dict) -> None:
    """NaN in all memory that belongs to no sequence: nothing of it is anybody's."""
    batch = a["q"].shape[0] if "cu_seqlens_q" not in a else a["cu_seqlens_q"].numel() - 1
    of_q, of_k = (
        torch.zeros(x.shape[:-2] if x.dim() == 4 else (1, x.shape[0]), dtype=torch.bool) for x in (a["q"], a["k"])
    )
    of_bias = torch.zeros(a["bias"].shape, dtype=torch.bool) if "bias" in a else None
    for b in range(batch):
        (entry, rows), keys = places(b, a)
        of_q[entry, rows] = True
        for place in keys:
            of_k[place] = True
        if of_bias is not None:
            of_rows = slice(0, rows.stop - rows.start) if of_bias.shape[2] > 1 else slice(None)
            of_bias[b if of_bias.shape[0] > 1 else 0, :, of_rows, : len(keys)] = True

    def lost(x, kept):
        return x.masked_fill(~kept, torch.nan)

    for name, kept in (("q", of_q), ("k", of_k), ("v", of_k)):
        a[name] = lost(a[name], kept.view(a[name].shape[:-2])[..., None, None])
    kept = of_q.view(a["q"].shape[:-2])
    gradients["dout"] = lost(gradients["dout"], kept[..., None, None])
    gradients["dlse"] = lost(gradients["dlse"], kept[:, None] if kept.dim() == 2 else kept)
    if of_bias is not None:
        a["bias"] = lost(a["bias"], of_bias)


@settings(
    max_examples=1000 if FULL else 150, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)  # fmt: skip
@given(
    tables(),
    st.booleans(),
    st.booleans(),
    st.sampled_from([(512, 512), (16, 16), (7, 8)]),
    st.sampled_from([1 << 10, 1 << 23]),
)
def test_every_table_means_what_it_says(a: dict, on_device: bool, poisoned: bool, blocks, elements):
    g = torch.Generator().manual_seed(1)
    dout = torch.randn((*a["q"].shape[:-1], a["v"].shape[-1]), generator=g, dtype=torch.float64)
    heads_first = (1, 0) if a["q"].dim() == 3 else (0, 2, 1)
    dlse = torch.randn([a["q"].shape[d] for d in heads_first], generator=g)
    expected = attend(dout, dlse, a)
    gradients = {"dout": dout, "dlse": dlse}
    if poisoned:
        poison(a, gradients)
    if "block_table" in a or "cache_batch_idx" in a:  # a KV cache, which has no gradient
        gradients = {}
    with blocks_of(*blocks, elements):
        got = run_engine(ENGINE, **a, **gradients, on_device=on_device)
    for name, x in expected.items():
        if name not in got:
            continue
        tolerance = 1e-5 if name in ("lse", "dbias", "dsink") else 1e-10  # fp32, and fp64
        torch.testing.assert_close(
            got[name].double(), x.double(), rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )
