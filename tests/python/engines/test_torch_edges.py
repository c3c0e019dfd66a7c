"""The torch engine where random problems do not reach: NaN and inf, garbage, devices, very many sequences."""

from __future__ import annotations

from functools import partial
from unittest import mock

import flash_attn
import pytest
import torch
from flash_attn import flash_attn_func, flash_attn_with_kvcache
from flash_attn._engines.torch.dropout import philox4x32_10
from flash_attn._engines.torch.sequences import Rows
from support.problem import make_problem, run_engine
from torch.utils._python_dispatch import TorchDispatchMode

from .test_torch import ENGINE, blocks_of, without_state

normal = partial(torch.randn, dtype=torch.float64)
GRADIENTS = ("dq", "dk", "dv")


def oracle(q, k, v, dout, dlse, sink=None, bias=None, **options):
    leaves = {"q": q, "k": k, "v": v} | {n: x for n, x in (("sink", sink), ("bias", bias)) if x is not None}
    leaves = {name: x.detach().clone().requires_grad_() for name, x in leaves.items()}
    with flash_attn.backend("reference"):
        out, lse, *_ = flash_attn_func(
            *(leaves[n] for n in "qkv"), return_attn_probs=True, learnable_sink=leaves.get("sink"),
            attn_bias=leaves.get("bias"), **options,
        )  # fmt: skip
        gradients = torch.autograd.grad((out, lse), leaves.values(), (dout, dlse))
    return {"out": out.detach(), "lse": lse.detach()} | {"d" + n: g for n, g in zip(leaves, gradients, strict=True)}


MASKS = {
    "all": {},
    "causal": {"causal": True},
    "window": {"window_size": (3, 2)},
    "one side": {"window_size": (-1, 1)},
    "softcap": {"softcap": 1.5, "causal": True},
}


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("poisoned", ["q", "k", "v", "dout", "dlse", "sink", "bias"])
@pytest.mark.parametrize("mask", MASKS)
def test_what_is_not_finite_reaches_what_depends_on_it_and_nothing_else(mask, poisoned, value):
    torch.manual_seed(3)
    x = {
        "q": normal(2, 19, 4, 5), "k": normal(2, 23, 2, 5), "v": normal(2, 23, 2, 6), "sink": normal(4),
        "bias": normal(2, 4, 19, 23), "dout": normal(2, 19, 4, 6), "dlse": torch.randn(2, 4, 19),
    }  # fmt: skip
    if poisoned not in ("sink", "bias"):  # a row of a sink alone, too
        del x["bias"]
    x[poisoned].view(-1)[x[poisoned].numel() // 2] = value
    exact = oracle(**x, **MASKS[mask])
    for on_device, blocks in ((False, (512, 512)), (True, (8, 8))):
        with blocks_of(*blocks):
            got = run_engine(ENGINE, **x, **MASKS[mask], on_device=on_device)
        for name, y in exact.items():
            assert torch.equal(got[name].isfinite(), y.isfinite()), name
            # Gradients are sums: an inf of the oracle may be NaN here, as what meets it comes in another order.
            if name in ("out", "lse"):
                torch.testing.assert_close(got[name].double(), y.double(), equal_nan=True, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_rows_of_nothing_leave_no_trace(dtype):
    """Their lse is that of nothing, whichever sign of inf it has; what they hold in dout or q reaches nobody."""
    q, k, v, dout = (normal(1, 4, 1, 8).to(dtype) for _ in range(4))
    bias = torch.zeros(1, 1, 4, 4)
    bias[0, 0, 2] = -torch.inf  # row 2 sees no key by its bias
    dout[0, 2] = torch.nan
    dlse = torch.zeros(1, 1, 4)
    dlse[0, 0, 2] = torch.nan
    for empty in (torch.inf, -torch.inf):
        got = run_engine(ENGINE, q=q, k=k, v=v, dout=dout, dlse=dlse, bias=bias, positive_empty_lse=empty > 0)
        assert got["lse"][0, 0, 2] == empty and not got["out"][0, 2].any() and not got["dq"][0, 2].any()
        assert all(got[name].isfinite().all() for name in (*GRADIENTS, "dbias"))
        assert got["dv"].any() and not got["dbias"][0, 0, 2].any()


def test_a_row_whose_scores_are_all_minus_infinity_sees_nothing():
    q, v, dout = normal(1, 3, 1, 4).abs(), normal(1, 5, 1, 4), normal(1, 3, 1, 4)
    k = normal(1, 5, 1, 4)
    k[..., 2] = -torch.inf
    x = {"q": q, "k": k, "v": v, "dout": dout, "dlse": torch.ones(1, 1, 3)}
    got, exact = run_engine(ENGINE, **x), oracle(**x)
    for name, y in exact.items():
        assert torch.equal(got[name].double(), y.double()), name


def test_a_row_of_a_sink_alone_does_not_depend_on_dout():
    q, k, v, dout = (normal(1, n, 1, 4) for n in (5, 2, 2, 5))
    dout[0, 1] = torch.nan  # rows 0, 1 and 2 see no key
    x = {"q": q, "k": k, "v": v, "dout": dout, "dlse": torch.randn(1, 1, 5), "sink": normal(1), "causal": True}
    got, exact = run_engine(ENGINE, **x), oracle(**x)
    for name, y in exact.items():
        torch.testing.assert_close(got[name].double(), y.double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("low", [-1e9, torch.finfo(torch.float32).min, -1e300])
def test_a_finite_bias_never_hides_a_key(low):
    q, k, v, dout = (torch.randn(1, 5, 2, 8) * 0.1 for _ in range(4))
    bias = torch.full((1, 1, 5, 5), low, dtype=torch.float64)
    x = {"q": q, "k": k, "v": v, "dout": dout, "dlse": torch.zeros(1, 2, 5)}
    got = run_engine(ENGINE, **x, bias=bias)
    torch.testing.assert_close(got["out"], v.mean(1, keepdim=True).expand_as(v))
    torch.testing.assert_close(got["dv"], (dout.mean(1, keepdim=True)).expand_as(v))


@pytest.mark.parametrize("size", [1e15, 1e30])
def test_the_largest_of_huge_scores_takes_all_the_weight(size):
    q = torch.ones(1, 3, 1, 1)
    k = torch.tensor([1.0, 3.0, 2.0]).view(1, 3, 1, 1) * size
    v, dout = torch.randn(1, 3, 1, 1), torch.randn(1, 3, 1, 1)
    with blocks_of(512, 8):
        got = run_engine(ENGINE, q=q, k=k, v=v, dout=dout)
    assert torch.equal(got["out"], v[:, 1:2].expand_as(v)) and torch.equal(got["lse"], k.max().expand(1, 1, 3))
    torch.testing.assert_close(
        got["dv"].flatten(), torch.stack([dout[0, 0, 0, 0] * 0, dout.sum(), dout[0, 0, 0, 0] * 0])
    )


def test_philox_gives_the_published_numbers():
    for counter, key, expected in (
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ):
        counter, key, expected = ([int(word, 16) for word in words.split()] for words in (counter, key, expected))
        assert [int(x) for x in philox4x32_10(*torch.tensor(counter), *key)] == expected


@pytest.mark.parametrize("on_device", [False, True])
def test_drops_what_the_oracle_drops(on_device):
    """Values are unit vectors: out shows every entry."""
    q, k = normal(2, 21, 2, 4), normal(2, 43, 1, 4)
    v = torch.eye(43, dtype=torch.float64).view(1, 43, 1, 43).expand(2, -1, -1, -1)
    torch.manual_seed(5)
    with flash_attn.backend("reference"):
        exact = flash_attn_func(q, k, v, dropout_p=0.3)
    torch.manual_seed(5)
    state = torch.randint(2**63 - 1, (2,))
    x = {"q": q, "k": k, "v": v, "dropout_p": 0.3, "on_device": on_device}
    with blocks_of(8, 16):
        as_tensor = run_engine(ENGINE, **x, dropout_state=state)["out"]
        as_numbers = run_engine(ENGINE, **x, dropout_state=state, change=without_state)["out"]
    assert torch.equal(as_tensor == 0, exact == 0) and torch.equal(as_tensor, as_numbers)
    assert 0.25 < (exact == 0).double().mean() < 0.35
    x["dropout_state"] = torch.tensor([-3, 7 - 2**63])  # uint64 numbers, and their image in int64
    assert torch.equal(run_engine(ENGINE, **x)["out"], run_engine(ENGINE, **x, change=without_state)["out"])


# Keys join a cache.


def cache_call(layout: str, dtype, g: torch.Generator) -> dict:
    """Three sequences with 20, 0 and 65 keys of 75; the sum of new ones is at most 10 each."""

    def make(*shape):
        return torch.randn(shape, generator=g).to(dtype)

    a = {"q": make(3, 6, 4, 32), "seqused_k": torch.tensor([20, 0, 65], dtype=torch.int32)}
    shape = (3, 75)
    if layout == "pages":
        shape = (20, 16)
        a["block_table"] = torch.randperm(20, generator=g)[:15].view(3, 5).to(torch.int32)
    elif layout == "entries":
        shape = (5, 75)
        a["cache_batch_idx"] = torch.tensor([4, 0, 2], dtype=torch.int32)
    return a | {"k": make(*shape, 2, 32), "v": make(*shape, 2, 32)}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["fixed", "entries", "pages"])
@pytest.mark.parametrize("new", ["fixed", "packed", "packed, none", "packed, with a tail", "none but a tail"])
@pytest.mark.parametrize("rotary", ["", "halves", "pairs", "positions", "fp32 tables"])
def test_new_keys_join_the_cache_as_in_the_oracle(dtype, layout, new, rotary):
    g = torch.Generator().manual_seed(11)
    a = cache_call(layout, dtype, g)
    if layout != "entries":
        a["leftpad_k"] = torch.tensor([3, 0, 10], dtype=torch.int32)
    shape = (3, 7)
    if new != "fixed":
        cu = torch.tensor([0, 0, 0, 0] if "none" in new else [0, 4, 4, 13], dtype=torch.int32)
        a["cu_seqlens_new"] = cu
        shape = (int(cu[-1]) + (2 if "tail" in new else 0),)
    for name in ("new_k", "new_v"):
        a[name] = torch.randn(*shape, 2, 32, generator=g).to(dtype)
    if rotary:
        table = torch.float32 if rotary == "fp32 tables" else dtype
        angle = torch.rand(100, 12, generator=g) * 6
        a |= {"rotary_cos": angle.cos().to(table), "rotary_sin": angle.sin().to(table)}
        if rotary == "positions":
            a["rotary_positions"] = torch.tensor([1, 50, 7], dtype=torch.int32)
    interleaved = rotary == "pairs"
    for masked in ({}, {"causal": True}, {"window_size": (9, -1)}):
        theirs, ours = ({name: a[name].clone() for name in "kv"} for _ in range(2))
        with flash_attn.backend("reference"):
            out, lse = flash_attn_with_kvcache(
                a["q"], theirs["k"], theirs["v"], a["new_k"], a["new_v"], a.get("rotary_cos"), a.get("rotary_sin"),
                a["seqused_k"], a.get("cache_batch_idx"), a.get("leftpad_k"), a.get("block_table"),
                rotary_interleaved=interleaved, return_softmax_lse=True, cu_seqlens_k_new=a.get("cu_seqlens_new"),
                rotary_positions=a.get("rotary_positions"), **masked,
            )  # fmt: skip
        for on_device in (False, True):
            ours = {name: a[name].clone() for name in "kv"}
            got = run_engine(ENGINE, **(a | ours), rotary_interleaved=interleaved, on_device=on_device, **masked)
            assert torch.equal(ours["k"], theirs["k"]) and torch.equal(ours["v"], theirs["v"])
            eps = torch.finfo(dtype).eps
            torch.testing.assert_close(got["out"], out, rtol=4 * eps, atol=4 * eps)
            torch.testing.assert_close(got["lse"], lse, rtol=1e-5, atol=1e-5)


def test_sequences_without_new_keys_disturb_no_shared_page():
    """Two sequences share a page; the second's new key goes there, the first has none."""
    k, v = torch.zeros(2, 4, 1, 2), torch.zeros(2, 4, 1, 2)
    run_engine(
        ENGINE, q=torch.randn(3, 1, 1, 2), k=k, v=v, new_k=torch.ones(3, 1, 2), new_v=torch.ones(3, 1, 2),
        cu_seqlens_new=torch.tensor([0, 0, 1, 1], dtype=torch.int32), on_device=True,
        seqused_k=torch.tensor([2, 2, 2], dtype=torch.int32),
        block_table=torch.tensor([[1], [1], [1]], dtype=torch.int32),
    )  # fmt: skip
    expected = torch.zeros(2, 4, 1, 2)
    expected[1, 2] = 1
    assert torch.equal(k, expected) and torch.equal(v, expected)


# Garbage, devices, sizes.

TABLES = (
    "cu_seqlens_q cu_seqlens_k seqused_q seqused_k leftpad_k cache_batch_idx block_table cu_seqlens_new "
    "rotary_positions"
).split()


def garbage_calls() -> dict[str, dict]:
    """Calls of every layout, with all tables that may go together. Of 3 sequences."""

    def table(*shape):
        return torch.zeros(shape, dtype=torch.int32)

    ones = torch.rand
    q, packed_q = ones(3, 5, 2, 4), ones(11, 2, 4)
    used = {"seqused_q": table(3), "seqused_k": table(3), "leftpad_k": table(3)}
    new = {"new_k": ones(7, 1, 4), "new_v": ones(7, 1, 4), "cu_seqlens_new": table(4), "rotary_positions": table(3)}
    new |= {"rotary_cos": ones(9, 2), "rotary_sin": ones(9, 2), "seqused_k": table(3)}
    fixed = {"k": ones(3, 20, 1, 4), "v": ones(3, 20, 1, 4)}
    pages = {"k": ones(6, 4, 1, 4), "v": ones(6, 4, 1, 4), "block_table": table(3, 5)}
    packed_k = {"k": ones(23, 1, 4), "v": ones(23, 1, 4), "cu_seqlens_k": table(4), "max_seqlen_k": 23}
    packed = {"q": packed_q, "cu_seqlens_q": table(4), "max_seqlen_q": 11}
    return {
        "fixed": {"q": q} | fixed | used,
        "entries": {"q": q} | fixed | used | {"cache_batch_idx": table(3)},
        "packed": packed | packed_k | used,
        "packed, short bounds": packed | packed_k | used | {"max_seqlen_q": 3, "max_seqlen_k": 6},
        "pages": packed | pages | used,
        "pages, cu_seqlens_k": packed | pages | used | {"cu_seqlens_k": table(4), "max_seqlen_k": 20},
        "append": {"q": q} | fixed | used | new,
        "append to pages": packed | pages | used | new,
    }


def gradients_of(call: dict) -> dict:
    """dout and dlse, unless the call is one of a KV cache, which has no gradient."""
    if any(name in call for name in ("new_k", "block_table", "cache_batch_idx")):
        return {}
    packed = call["q"].dim() == 3
    return {"dout": torch.rand(call["q"].shape), "dlse": torch.rand(call["q"].shape[:-1]).mT if packed else None}


def dice(shape, g: torch.Generator) -> torch.Tensor:
    """int32 of all sizes."""
    size = 2 ** torch.randint(1, 32, shape, generator=g)
    return (
        (torch.randint(-(2**31), 2**31, shape, generator=g) % size - size // 4)
        .clamp(-(2**31), 2**31 - 1)
        .to(torch.int32)
    )


@pytest.mark.parametrize("layout", garbage_calls())
def test_garbage_in_tables_leads_nowhere(layout):
    """Reads and writes stay inside: an index too large raises on the CPU, one below 0 (which wraps) is looked for."""
    locate = Rows.locate

    def checked(rows, b, row):
        entry, row = locate(rows, b, row)
        for x, n in ((entry, rows.entries), (row, rows.rows)):
            assert x.numel() == 0 or 0 <= int(x.min()) <= int(x.max()) < n
        return entry, row

    call = garbage_calls()[layout]
    g = torch.Generator().manual_seed(0)
    with mock.patch.object(Rows, "locate", checked):
        for _ in range(40):

            def change(t):
                for name in TABLES:
                    if getattr(t, name) is not None:
                        setattr(t, name, dice(getattr(t, name).shape, g))

            got = run_engine(ENGINE, **call, causal=True, on_device=True, change=change, **gradients_of(call))
            assert got["out"].isfinite().all()


class NothingReachesTheHost(TorchDispatchMode):
    """Fails on what waits for a device, or is shaped by contents; notes the largest tensor made."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal.default", "is_nonzero")
    largest = 0

    def __torch_dispatch__(self, op, types, arguments=(), kwargs=None):
        assert not any(word in str(op) for word in self.FORBIDDEN), op
        if "index" in str(op):
            indices = [x for a in arguments if isinstance(a, (list, tuple)) for x in a if isinstance(x, torch.Tensor)]
            assert all(x.dtype != torch.bool for x in indices), op
        result = op(*arguments, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result._base is None and result.untyped_storage().nbytes():
            self.largest = max(self.largest, result.untyped_storage().nbytes() // result.element_size())
        return result


@pytest.mark.parametrize("layout", garbage_calls())
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_nothing_waits_for_the_device(layout, device):
    """On meta, whose tensors have no contents, everything also must have been made on the device of q."""
    call = garbage_calls()[layout] | {
        "causal": True, "softcap": 2.0, "dropout_p": 0.5, "dropout_state": torch.tensor([3, 4]), "sink": torch.rand(2),
        "alibi_slopes": torch.rand(3, 2), "on_device": True,
    }  # fmt: skip
    p, t = make_problem(**call)
    call["bias"] = torch.rand(1, 2, 1, p.max_seqlen_k, dtype=torch.float64)
    problems = [make_problem(**call)]
    if gradients := gradients_of(call):
        problems.append(make_problem(**call, **gradients, out=t.out, lse=t.lse, is_backward=True))
    for p, t in problems:
        for name, x in vars(t).items():
            if isinstance(x, torch.Tensor):
                setattr(t, name, x.to(device))
        with NothingReachesTheHost():
            (ENGINE.backward if p.is_backward else ENGINE.forward)(p, t)


def test_memory_is_linear_in_the_sequence():
    q = torch.rand(1, 3000, 2, 8)
    mode = NothingReachesTheHost()
    with blocks_of(64, 64, 1 << 14), mode:
        run_engine(ENGINE, q=q, k=q, v=q, dout=q, dlse=None, causal=True, on_device=True)
    assert mode.largest <= 2 * q.numel()


def test_very_many_sequences():
    """More than 65535, most of them empty."""
    lengths = torch.randint(0, 3, (70000,))
    cu = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(torch.int32)
    x = {name: torch.randn(int(cu[-1]), 1, 4) for name in ("q", "k", "v", "dout")}
    tables = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": 2, "max_seqlen_k": 2}
    got = run_engine(ENGINE, **x, **tables, dlse=None, causal=True, on_device=True)
    leaves = [x[name].requires_grad_() for name in "qkv"]
    exact = flash_attn.flash_attn_varlen_func(*leaves, cu, cu, 2, 2, causal=True)
    torch.testing.assert_close(got["out"], exact)
    for name, g in zip(GRADIENTS, torch.autograd.grad(exact, leaves, x["dout"]), strict=True):
        torch.testing.assert_close(got[name], g, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch, seqlen_q, seqlen_k", [(0, 3, 4), (2, 0, 4), (2, 3, 0), (2, 0, 0), (2**40, 0, 0)])
@pytest.mark.parametrize("sink", [False, True])
def test_nothing_to_attend(batch, seqlen_q, seqlen_k, sink):
    q, k = (
        torch.empty(1, seqlen_q, 2, 4).expand(batch, -1, -1, -1),
        torch.empty(1, seqlen_k, 1, 4).expand(batch, -1, -1, -1),
    )
    if batch < 10:
        q, k = torch.rand(q.shape), torch.rand(k.shape)
    x = {"dout": q, "dlse": torch.ones(batch, 2, seqlen_q)} if batch < 10 else {}
    got = run_engine(ENGINE, q=q, k=k, v=k, sink=torch.tensor([0.5, 1.0]) if sink else None, **x)
    assert not got["out"].any()
    if seqlen_q and not seqlen_k and batch:
        expected = torch.tensor([0.5, 1.0]) if sink else torch.full((2,), torch.inf)
        assert torch.equal(got["lse"], expected.view(1, 2, 1).expand_as(got["lse"]))
    if batch < 10:
        assert not any(got[name].any() for name in GRADIENTS)
        if sink:  # dlse reaches the sink where it is all there is
            assert (
                torch.equal(got["dsink"], torch.full((2,), float(batch * seqlen_q if seqlen_k == 0 else 0))) or seqlen_k
            )


def test_the_callers_modes_do_not_matter():
    q, k, v, dout = (torch.randn(2, 9, 2, 16) for _ in range(4))
    x = {"q": q, "k": k, "v": v, "dout": dout, "dlse": None, "causal": True}
    expected = run_engine(ENGINE, **x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = run_engine(ENGINE, **x)
    with torch.inference_mode():
        inference = run_engine(ENGINE, **x)
    leaves = x | {name: x[name].clone().requires_grad_() for name in "qkv"}
    for got in (autocast, inference, run_engine(ENGINE, **leaves)):
        for name, y in expected.items():
            assert y is None or torch.equal(got[name], y)
    with torch.inference_mode():
        cache = torch.zeros(2, 9, 2, 16)
    one = torch.tensor([1, 1], dtype=torch.int32)
    run_engine(ENGINE, q=q[:, :1], k=cache, v=cache.clone(), new_k=k[:, :2], new_v=v[:, :2], seqused_k=one)
    assert torch.equal(cache[:, 1:3], k[:, :2])


def test_operands_of_any_strides():
    """Expanded, and k, v as views of one tensor, k as v; bits do not depend on where they lie."""
    one = torch.randn(2, 1, 3, 64, 70)
    k, v, q = one.expand(-1, 2, -1, -1, -1).permute(0, 4, 2, 1, 3).unbind(2)
    x = {"q": q, "k": k, "v": k, "dout": v, "dlse": None}
    got = run_engine(ENGINE, **x)
    expected = run_engine(ENGINE, **{n: y if y is None else y.contiguous() for n, y in x.items()})
    assert all(y is None or torch.equal(got[name], y) for name, y in expected.items())


def test_plan_in_words():
    p, _ = make_problem(q=torch.rand(3, 5, 2, 4), k=torch.rand(3, 7, 1, 4), v=torch.rand(3, 7, 1, 4))
    assert ENGINE.plan(p) == "PyTorch operations on 3 sequences x 5 rows x 8 keys at a time, all heads; sums in float32"
