"""FlashAttention-4's calling surface: signatures, features against the formula, refusals, and who is imported."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path

import flash_attn
import pytest
import torch
from flash_attn.cute import interface
from flash_attn.cute.interface import (
    _flash_attn_bwd,
    _flash_attn_fwd,
    flash_attn_combine,
    flash_attn_func,
    flash_attn_varlen_func,
    get_scheduler_metadata,
)
from support.cute import (
    BASE,
    DTYPES,
    MODS,
    MORE_QUERIES,
    SLOPES,
    by_formula,
    causal_mask,
    check,
    gradients,
    operands,
    packed,
    with_lse,
)
from support.device import cpu_only, generator
from support.formula import attention, attention_varlen

pytestmark = pytest.mark.device

SIGNATURES = {
    "flash_attn_func": (
        "(q, k, v, qv=None, gather_kv_indices=None, softmax_scale=None, causal=False, window_size=(None, None), "
        "learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, score_mod=None, "
        "score_mod_bwd=None, mask_mod=None, aux_tensors=None, aux_scalars=None, block_sparse_tensors=None, "
        "block_sparse_tensors_bwd=None, return_lse=False, gather_bwd_recompute_p=False, gather_bwd_token_chunk=None)"
    ),
    "flash_attn_varlen_func": (
        "(q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, "
        "min_seqlen_k=None, seqused_q=None, seqused_k=None, gather_kv_indices=None, page_table=None, "
        "softmax_scale=None, causal=False, window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1, "
        "pack_gqa=None, deterministic=False, score_mod=None, score_mod_bwd=None, mask_mod=None, "
        "block_sparse_tensors=None, aux_tensors=None, aux_scalars=None, return_lse=False, scheduler_metadata=None, "
        "seqlen_k_per_split=None, disable_scheduler_metadata=False, gather_bwd_recompute_p=False, "
        "gather_bwd_token_chunk=None)"
    ),
    "flash_attn_combine": (
        "(out_partial, lse_partial, out=None, out_dtype=None, cu_seqlens=None, seqused=None, virtual_batch_idx=None, "
        "return_lse=True)"
    ),
    "get_scheduler_metadata": (
        "(max_seqlen_q, max_seqlen_k, nheads, nheads_kv, headdim, num_splits, headdim_v=None, pack_gqa=None, "
        "causal=False, window_size_left=None, window_size_right=None, seqlen_k_new=0, cu_seqlens_q=None, "
        "cu_seqlens_k=None, cu_seqlens_k_new=None, seqused_q=None, seqused_k=None, leftpad_k=None, "
        "seqlen_k_per_split=None, _arch=None)"
    ),
    "_flash_attn_fwd": (
        "(q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None, max_seqlen_q=None, "
        "max_seqlen_k=None, min_seqlen_k=None, page_table=None, softmax_scale=None, causal=False, softcap=None, "
        "window_size_left=None, window_size_right=None, learnable_sink=None, tile_mn=None, mma_pv_is_rs=None, "
        "intra_wg_overlap=None, num_threads=384, num_splits=1, pack_gqa=None, _arch=None, score_mod=None, "
        "mask_mod=None, block_sparse_tensors=None, return_lse=False, out=None, lse=None, aux_tensors=None, "
        "aux_scalars=None, q_descale=None, k_descale=None, v_descale=None, gather_kv_indices=None, "
        "scheduler_metadata=None, seqlen_k_per_split=None, disable_scheduler_metadata=False, "
        "gather_bwd_recompute_p=False)"
    ),
    "_flash_attn_bwd": (
        "(q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, window_size_left=None, "
        "window_size_right=None, m_block_size=64, n_block_size=128, num_threads=256, pack_gqa=False, num_stages_Q=2, "
        "num_stages_dO=2, SdP_swapAB=False, dKV_swapAB=False, dQ_swapAB=False, AtomLayoutMSdP=2, AtomLayoutNdKV=2, "
        "AtomLayoutMdQ=2, V_in_regs=False, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None, "
        "max_seqlen_q=None, max_seqlen_k=None, deterministic=False, dq=None, dk=None, dv=None, score_mod=None, "
        "score_mod_bwd=None, mask_mod=None, aux_tensors=None, aux_scalars=None, block_sparse_tensors=None, dlse=None, "
        "learnable_sink=None)"
    ),
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name):
    parameters = inspect.signature(getattr(interface, name)).parameters.values()
    plain = [p.replace(annotation=inspect.Parameter.empty) for p in parameters]
    assert str(inspect.Signature(plain)) == SIGNATURES[name]


# ---- Against the formula ---------------------------------------------------------------------------------------------


FEATURES = {
    "plain": (BASE, {}, {}),
    "causal, rows that see nothing": (MORE_QUERIES, {"causal": True}, {"causal": True}),
    "window": (BASE, {"window_size": (7, 5)}, {"window_size": (7, 5)}),
    "window left": (BASE, {"window_size": (7, None)}, {"window_size": (7, -1)}),
    "window right": (BASE, {"window_size": (None, 3)}, {"window_size": (-1, 3)}),
    "no window, FlashAttention-2's way": (BASE, {"window_size": (-1, -1)}, {}),
    "softcap, scale": (BASE, {"softcap": 2.0, "softmax_scale": 0.3}, {"softcap": 2.0, "softmax_scale": 0.3}),
    "what tunes": (BASE, {"num_splits": 3, "pack_gqa": True, "deterministic": True}, {}),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FEATURES)
def test_feature(name, dtype):
    shape, ours, formula = FEATURES[name]
    check(with_lse(**ours), by_formula(**formula), operands(shape, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
def test_sink(causal, dtype):
    tensors = operands(MORE_QUERIES, dtype)
    sink = torch.randn(4, generator=generator(1)).to(dtype)
    check(with_lse(causal=causal), by_formula(causal=causal), tensors, {"learnable_sink": sink})
    _, lse = flash_attn_func(*tensors, causal=True, learnable_sink=sink, return_lse=True)
    assert torch.equal(lse[:, :, :16], sink.float()[None, :, None].expand(2, 4, 16))  # what sees nothing sees the sink


def test_results():
    q, k, v = operands(BASE, torch.bfloat16)
    out, lse = flash_attn_func(q, k, v)
    assert out.shape == (2, 37, 4, 24) and lse is None
    assert flash_attn_func(q, k, v, return_lse=True)[1].shape == (2, 4, 37)
    assert flash_attn_func(q.requires_grad_(), k, v)[1].requires_grad
    with torch.no_grad():
        assert flash_attn_func(q, k, v)[1] is None
    same = lambda s, b, h, i, j: s  # noqa: E731
    assert flash_attn_func(q.detach(), k, v, score_mod=same)[1] is None
    assert flash_attn_func(q, k, v, score_mod=same)[1].requires_grad


def test_compiles():
    q, k, v = (x.requires_grad_() for x in operands(MORE_QUERIES, torch.float32))
    ours = torch.compile(lambda *x: flash_attn_func(*x, causal=True, return_lse=True), backend="eager", fullgraph=True)
    for a, b in zip(ours(q, k, v), flash_attn_func(q, k, v, causal=True, return_lse=True), strict=True):
        assert torch.equal(a, b)
    mods = torch.compile(lambda *x: flash_attn_func(*x, mask_mod=causal_mask)[0] * 2, backend="eager")  # in two graphs
    torch.testing.assert_close(mods(q, k, v), flash_attn_func(q, k, v, mask_mod=causal_mask)[0] * 2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_qv(dtype):
    q, k, v = operands((2, 21, 33, 4, 2, 16, 24), dtype)
    qv = torch.randn(2, 21, 4, 24, generator=generator(2)).to(dtype)

    def formula(q, k, v, qv):
        return attention(torch.cat([q, qv], -1), torch.cat([k, v], -1), v, torch.float64, causal=True)

    leaves = [x.requires_grad_() for x in (q, k, v, qv)]
    doubles = [x.detach().double().requires_grad_() for x in leaves]
    out, lse = flash_attn_func(*leaves, causal=True, return_lse=True)
    exact, exact_lse = formula(*doubles)
    assert lse.shape == (2, 21, 4)
    bound = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 16 * torch.finfo(dtype).eps}
    torch.testing.assert_close(lse.transpose(1, 2).double(), exact_lse, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.double(), exact, **bound)
    ours, theirs = (torch.autograd.grad(x.sum(), y) for x, y in ((out, leaves), (exact, doubles)))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.double(), b, **bound)
    alone, _ = flash_attn_func(None, None, v, qv)
    assert torch.equal(alone, flash_attn_func(qv, v, v)[0])


# ---- Sequences of their own lengths ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_varlen(dtype):
    tensors, cu_q, cu_k = packed(dtype)
    sink = torch.randn(4, generator=generator(1)).to(dtype)
    tables = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "max_seqlen_q": 19, "max_seqlen_k": 30}
    ours = with_lse(flash_attn_varlen_func, causal=True, window_size=(9, None), **tables)

    def formula(dtype):
        options = {"causal": True, "window_size": (9, -1)}
        return lambda q, k, v, **e: attention_varlen(q, k, v, cu_q, cu_k, dtype, **options, **e)

    check(ours, formula, tensors, {"learnable_sink": sink})
    check(ours, formula, tensors)
    del tables["max_seqlen_q"], tables["max_seqlen_k"]
    assert torch.equal(flash_attn_varlen_func(*tensors, **tables)[0], flash_attn_varlen_func(*tensors, **tables)[0])


@pytest.mark.parametrize("mods", [{}, {"mask_mod": lambda b, h, i, j: j <= i + 2}], ids=["plain", "mask_mod"])
def test_lengths_in_use_and_pages(mods):
    q, k, v = operands((3, 9, 12, 4, 2, 16, 16), torch.float32)
    used_q, used_k = torch.tensor([9, 0, 4], dtype=torch.int32), torch.tensor([12, 3, 7], dtype=torch.int32)
    out, lse = flash_attn_varlen_func(q, k, v, seqused_q=used_q, seqused_k=used_k, return_lse=True, **mods)
    for b, (n, m) in enumerate(zip(used_q.tolist(), used_k.tolist(), strict=True)):
        alone = flash_attn_func(q[b : b + 1, :n], k[b : b + 1, :m], v[b : b + 1, :m], return_lse=True, **mods)
        torch.testing.assert_close(out[b : b + 1, :n], alone[0], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(lse[b : b + 1, :, :n], alone[1], rtol=1e-6, atol=1e-6)
        assert not out[b, n:].any() and (lse[b, :, n:] == -torch.inf).all()

    order = torch.randperm(9, generator=generator(0))  # pages of 4 rows, 3 of each sequence
    pages = [torch.empty(9, 4, 2, 16) for _ in (k, v)]
    for page, x in zip(pages, (k, v), strict=True):
        page[order] = x.reshape(9, 4, 2, 16)
    table = order.reshape(3, 3).to(torch.int32)
    paged, _ = flash_attn_varlen_func(q, *pages, seqused_q=used_q, seqused_k=used_k, page_table=table, **mods)
    torch.testing.assert_close(paged, out, rtol=1e-6, atol=1e-6)
    with pytest.raises(NotImplementedError, match="pages of keys and values are not differentiable"):
        flash_attn_varlen_func(q.requires_grad_(), *pages, page_table=table, **mods)[0].sum().backward()


# ---- The private functions, and parts --------------------------------------------------------------------------------


@pytest.mark.parametrize("mods", [{}, MODS["both"]], ids=["plain", "mods"])
def test_forward_and_backward_alone(mods):
    q, k, v = operands(BASE, torch.bfloat16)
    sink = torch.randn(4, generator=generator(1))
    options = {"learnable_sink": sink, **mods}
    ours, dout = gradients(
        lambda q, k, v, **e: flash_attn_func(q, k, v, **mods, **e, return_lse=True), (q, k, v), {"learnable_sink": sink}
    )
    out, lse = torch.empty(2, 37, 4, 24, dtype=torch.bfloat16), torch.empty(2, 4, 37)
    results = _flash_attn_fwd(q, k, v, **options, out=out, lse=lse)
    assert len(results) == 4 and results[0] is out and results[1] is lse and results[2:] == (None, None)
    assert torch.equal(out, ours[0]) and torch.equal(lse, ours[1])
    assert _flash_attn_fwd(q, k, v, **options)[1] is None
    dlse = torch.randn(lse.shape, generator=generator(6))
    _, *want = gradients_of(lambda *x: flash_attn_func(*x[:3], learnable_sink=x[3], **mods, return_lse=True),
                            (q, k, v, sink), dout, dlse)  # fmt: skip
    dq = torch.empty_like(q)
    got = _flash_attn_bwd(q, k, v, out, dout, lse, dq=dq, dlse=dlse, **options)
    assert got[0] is dq and len(got) == 4
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
    assert len(_flash_attn_bwd(q, k, v, out, dout, lse, **mods)) == 3


def gradients_of(function, leaves, dout, dlse):
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    out, lse = function(*leaves)
    return [out, *torch.autograd.grad((out, lse), leaves, (dout, dlse))]


@pytest.mark.parametrize("dtype", DTYPES)
def test_combine(dtype):
    q, k, v = operands((2, 9, 40, 4, 2, 16, 16), dtype)
    parts = [flash_attn_func(q, k[:, s], v[:, s], return_lse=True) for s in (slice(0, 7), slice(7, 7), slice(7, 40))]
    outs = torch.stack([out.float() for out, _ in parts])
    lses = torch.stack([lse.transpose(1, 2) for _, lse in parts])
    outs[1] = torch.nan  # of a part that saw nothing
    out, lse = flash_attn_combine(outs, lses, out_dtype=dtype)
    exact, exact_lse = attention(q, k, v, torch.float64)
    plain, _ = attention(q, k, v, dtype)
    assert out.dtype == dtype and lse.shape == (2, 9, 4)
    torch.testing.assert_close(lse.transpose(1, 2).double(), exact_lse, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(out.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=2 * torch.finfo(dtype).eps)

    into = torch.empty_like(out)
    given, none = flash_attn_combine(outs, lses, into, return_lse=False)
    assert given is into and torch.equal(into, out) and none is None
    flat, flat_lse = flash_attn_combine(outs.flatten(1, 2), lses.flatten(1, 2), out_dtype=dtype)
    assert torch.equal(flat, out.flatten(0, 1)) and torch.equal(flat_lse, lse.flatten(0, 1))

    used = torch.tensor([3, 9], dtype=torch.int32)
    short, short_lse = flash_attn_combine(outs, lses, out_dtype=dtype, seqused=used)
    assert not short[0, 3:].any() and (short_lse[0, 3:] == -torch.inf).all()
    assert torch.equal(short[0, :3], out[0, :3]) and torch.equal(short[1], out[1])
    cu = torch.tensor([0, 9, 18], dtype=torch.int32)
    rows, _ = flash_attn_combine(outs.flatten(1, 2), lses.flatten(1, 2), out_dtype=dtype, cu_seqlens=cu, seqused=used)
    assert torch.equal(rows, short.flatten(0, 1))
    with pytest.raises(ValueError, match="lse_partial: expected"):
        flash_attn_combine(outs, lses[:, :1])


def test_autograd_classes():
    tensors = operands(BASE, torch.float32)
    out, lse = interface.FlashAttnFunc.apply(*tensors, None, None, 0.3, True)
    assert torch.equal(out, flash_attn_func(*tensors, softmax_scale=0.3, causal=True)[0]) and lse is None
    names = [p for p in inspect.signature(interface.FlashAttnVarlenFunc.forward).parameters]
    assert names[4:14] == ["qv", "cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k", "max_seqlen_q",
                           "max_seqlen_k", "min_seqlen_k", "gather_kv_indices", "page_table"]  # fmt: skip
    tensors, cu_q, cu_k = packed(torch.float32)
    used = torch.tensor([3, 0, 5, 1], dtype=torch.int32)
    out, _ = interface.FlashAttnVarlenFunc.apply(*tensors, None, cu_q, cu_k, used)
    assert torch.equal(out, flash_attn_varlen_func(*tensors, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, seqused_q=used)[0])


def test_scheduler_metadata():
    metadata = get_scheduler_metadata(19, 30, 4, 2, 16, 1)
    tensors, cu_q, cu_k = packed(torch.float32)
    out, _ = flash_attn_varlen_func(*tensors, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, scheduler_metadata=metadata)
    assert torch.equal(out, flash_attn_varlen_func(*tensors, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)[0])


# ---- Refusals --------------------------------------------------------------------------------------------------------


def same(score, b, h, q_idx, kv_idx):
    return score


def reads_a_table(score, b, h, q_idx, kv_idx, aux_tensors):
    return score + aux_tensors[0][h]


def of_the_dsl(score, b, h, q_idx, kv_idx, seqlen_info, aux_tensors):
    return score


of_the_dsl._dsl_object = object()  # what @cute.jit leaves


REFUSED = {
    "window": ({"window_size": (-1, 0)}, ValueError, "window_size: expected None, for no limit, or at least 0"),
    "window of one": ({"window_size": 3}, ValueError, "window_size: expected two integers or None"),
    "gather": ({"gather_kv_indices": torch.zeros(1)}, NotImplementedError, "gather_kv_indices: .* not served"),
    "softcap": ({"softcap": 1.0, "score_mod": same}, ValueError, "softcap: expected 0 with score_mod"),
    "no function": ({"score_mod": 3}, TypeError, "score_mod: expected a function"),
    "the DSL": ({"score_mod": of_the_dsl}, NotImplementedError, "a function of the CuTe DSL .* pass one written"),
    "parameters": ({"mask_mod": lambda b, h, i: True}, TypeError, r"expected parameters \(b, h, q_idx, kv_idx"),
    "keywords": ({"mask_mod": lambda b, h, i, j, *, k: True}, TypeError, "keyword-only parameter k"),
    "no aux": ({"score_mod": reads_a_table}, ValueError, "aux_tensors: score_mod takes them"),
    "aux": ({"score_mod": reads_a_table, "aux_tensors": torch.ones(3)}, TypeError, "aux_tensors: expected a list"),
    "bool": ({"score_mod": lambda s, b, h, i, j: s > 0}, TypeError, "expected to return a score, got bool"),
    "score": ({"mask_mod": lambda b, h, i, j: i * j}, TypeError, "expected to return a bool, got int64"),
    "row": ({"score_mod": lambda s, b, h, i, j: SLOPES}, TypeError, r"one number for one score, got a tensor of"),
    "none": ({"score_mod": lambda s, b, h, i, j: None}, TypeError, "one number for one score, got NoneType"),
    "bwd": ({"score_mod_bwd": lambda *x: x[0]}, ValueError, "score_mod_bwd: expected None without score_mod"),
    "sink": ({"score_mod": same, "learnable_sink": torch.zeros(3)}, ValueError, "learnable_sink"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    options, kind, words = REFUSED[name]
    with pytest.raises(kind, match=words):
        flash_attn_func(*operands(BASE, torch.float32), **options)


@cpu_only("names its backend")
def test_refused_by_state():
    q, k, v = operands(BASE, torch.float32)
    with flash_attn.use_backend("cpu"), pytest.raises(NotImplementedError, match="run on the backend torch.*; cpu was"):
        flash_attn_func(q, k, v, score_mod=same)
    with pytest.raises(ValueError, match="k: expected"):  # the core's words come first
        flash_attn_func(q, k[:, :, :, 1:], v, score_mod=same)
    with pytest.warns(UserWarning, match="mask_mod is the whole mask"):
        out, _ = flash_attn_func(q, k, v, causal=True, mask_mod=lambda b, h, i, j: j >= 0)
    torch.testing.assert_close(out, flash_attn_func(q, k, v)[0], rtol=1e-5, atol=1e-5)
    out, _ = flash_attn_func(q.requires_grad_(), k, v, score_mod=same)
    (dq,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        dq.sum().backward()
    with pytest.raises(NotImplementedError, match="fp8"):
        _flash_attn_fwd(q, k, v, q_descale=torch.ones(2, 2))


@cpu_only("names its backend")
def test_explained():
    q, k, v = operands(BASE, torch.bfloat16)
    explanation = flash_attn.explain(q, k, v, mask_mod=causal_mask)
    chosen = [c.backend for c in explanation.candidates if c.chosen]
    assert chosen == ["torch"] and explanation.plan.startswith("PyTorch operations")
    assert "run on the backends triton and torch" in {c.backend: c.why_not for c in explanation.candidates}["cpu"]
    assert {c.backend: c.chosen for c in flash_attn.explain(q, k, v).candidates}["cpu"]


# ---- Which flash_attn.cute -------------------------------------------------------------------------------------------


def imported(*path) -> str:
    return run(
        "import flash_attn.cute.interface as i, flash_attn.cute as c; print(c.__file__, i.flash_attn_func)", *path
    )


def run(code: str, *path) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*map(str, path), *filter(None, sys.path)])}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    ).stdout


def test_ours_steps_back(tmp_path):
    """An installed flash-attn-4 adds flash_attn/cute, in a directory of its own or in ours; then it is the one."""
    assert Path(interface.__file__).parent.name == "_cute" and interface.__name__ == "flash_attn.cute.interface"
    folder = tmp_path / "flash_attn" / "cute"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    (folder / "interface.py").write_text("flash_attn_func = 'theirs'\n")
    beside = [p for p in map(Path, flash_attn.__path__) if (p / "_attention.py").exists()]
    assert beside and not any((p / "cute").exists() for p in beside)  # no file of ours where theirs would be
    found = imported(beside[0].parent, tmp_path)  # ours first: flash_attn is ours, flash_attn.cute is not
    assert str(folder) in found and found.split()[-1] == "theirs"


def test_importing_is_lazy():
    code = "import flash_attn, sys; print([m for m in sys.modules if 'flash_attn.cute' in m or '_engines.torch' in m])"
    assert run(code).strip() == "[]"
