"""score_mod and mask_mod of flash_attn.cute, against the formula, each other and FlexAttention."""

from __future__ import annotations

import warnings

import pytest
import torch
from flash_attn.cute.interface import (
    flash_attn_func,
    flash_attn_varlen_func,
)
from support import device
from support.cute import (
    BASE,
    DOCUMENTS,
    DTYPES,
    LENGTHS_K,
    MODS,
    SLOPES,
    THE_SAME,
    alibi,
    by_formula,
    causal_mask,
    check,
    gradients,
    operands,
    packed,
    with_lse,
)
from support.device import generator
from support.formula import attention

pytestmark = pytest.mark.device


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MODS)
def test_mods(name, dtype):
    check(with_lse(**MODS[name]), by_formula(**MODS[name]), operands(BASE, dtype))


@pytest.mark.parametrize("name", THE_SAME)
def test_mods_are_what_they_say(name):
    tensors = operands(BASE, torch.float32)
    mods, _ = gradients(with_lse(**MODS[name]), tensors, {})
    options, _ = gradients(with_lse(**THE_SAME[name]), tensors, {})
    for a, b in zip(mods, options, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_alibi_is_the_slopes():
    tensors = operands(BASE, torch.float32)
    ours = flash_attn_func(*tensors, score_mod=alibi)[0]
    torch.testing.assert_close(ours[..., :24], attention(*tensors, torch.float32, alibi_slopes=SLOPES)[0], rtol=1e-5,
                               atol=1e-5)  # fmt: skip


def test_mods_with_sink():
    sink = torch.randn(4, generator=generator(1))
    for name in ("some heads", "both"):
        check(with_lse(**MODS[name]), by_formula(**MODS[name]), operands(BASE, torch.float32), {"learnable_sink": sink})


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_of_what_score_mod_reads(dtype):
    """A table of relative positions, and a number, by closure."""
    table = torch.randn(4, 96, generator=generator(3)).to(dtype)
    gain = torch.tensor(1.5, dtype=dtype)

    def ours(q, k, v, table, gain):
        bias = table * 2  # not a leaf
        mod = lambda s, b, h, i, j: s * gain + bias[h, i - j + 55]  # noqa: E731
        return flash_attn_func(q, k, v, score_mod=mod, mask_mod=causal_mask, return_lse=True)

    def formula(dtype):
        def attend(q, k, v, table, gain):
            bias = (table * 2).to(torch.promote_types(dtype, torch.float32))
            mod = lambda s, b, h, i, j: s * gain.to(bias.dtype) + bias[h, i - j + 55]  # noqa: E731
            return attention(q, k, v, dtype, score_mod=mod, mask_mod=causal_mask)

        return attend

    check(ours, formula, operands(BASE, dtype), {"table": table, "gain": gain})


def relative(score, b, h, q_idx, kv_idx, aux_tensors):
    return score + aux_tensors[0][h, q_idx - kv_idx + 55]


def relative_as_upstream(score, b, h, q_idx, kv_idx, seqlen_info, aux_tensors):
    return score + aux_tensors[0][h, q_idx - kv_idx + seqlen_info.seqlen_k + 2]


def relative_with_scalars(score, b, h, q_idx, kv_idx, seqlen_info, aux_tensors, aux_scalars):
    return score + aux_tensors[0][h, q_idx - kv_idx + aux_scalars[0]]


class Relative(torch.nn.Module):
    def __init__(self, table):
        super().__init__()
        self.table = torch.nn.Parameter(table)

    def forward(self, score, b, h, q_idx, kv_idx, shift=55):
        return score + self.table[h][q_idx - kv_idx + shift]


def test_where_a_table_comes_from():
    q, k, v = operands(BASE, torch.float32)
    table = torch.randn(4, 96, generator=generator(3)).requires_grad_()
    module = Relative(table.detach().clone())
    aux = {"aux_tensors": [table]}
    calls = [
        ({"score_mod": relative, **aux}, table),
        ({"score_mod": relative_as_upstream, **aux}, table),
        ({"score_mod": relative_with_scalars, **aux, "aux_scalars": (55,)}, table),
        ({"score_mod": lambda s, b, h, i, j, t=table: s + t[h, i - j + 55]}, table),
        ({"score_mod": module}, module.table),
    ]
    results = []
    for options, leaf in calls:
        out, _ = flash_attn_func(q, k, v, **options)
        results.append((out.detach(), *torch.autograd.grad(out.square().sum(), leaf)))
    for result in results[1:]:
        for a, b in zip(result, results[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    exact_table = table.detach().double().requires_grad_()
    exact, _ = attention(*(x.double() for x in (q, k, v)), torch.float64,
                         score_mod=lambda s, b, h, i, j: s + exact_table[h, i - j + 55])  # fmt: skip
    torch.testing.assert_close(results[0][0].double(), exact, rtol=1e-5, atol=1e-5)
    (dtable,) = torch.autograd.grad(exact.square().sum(), exact_table)
    torch.testing.assert_close(results[0][1].double(), dtable, rtol=1e-4, atol=1e-5)


def test_functions_that_do_not_broadcast():
    """What is a sum, a product or a largest of numbers is none of a block."""
    rows, columns = torch.randn(37, 3), torch.randn(53, 3)

    def low_rank(score, b, h, q_idx, kv_idx):
        return score + rows[q_idx] @ columns[kv_idx]

    calls = {
        "sum": lambda s, b, h, i, j: torch.stack([s, s]).sum(0) * 0.5 + s.softmax(0) - 1,
        "largest": lambda s, b, h, i, j: s.max() + j.max() * 0.01,
        "row of a table": lambda s, b, h, i, j: s + rows[i][h % 3],
        "product": low_rank,
    }
    expected = {
        "sum": lambda s, b, h, i, j: s,
        "largest": lambda s, b, h, i, j: s + j * 0.01,
        "row of a table": lambda s, b, h, i, j: s + rows.to(s.dtype)[i, h % 3],
        "product": lambda s, b, h, i, j: s + (rows.to(s.dtype)[i] * columns.to(s.dtype)[j]).sum(-1),
    }
    for name, mod in calls.items():
        check(with_lse(score_mod=mod), by_formula(score_mod=expected[name]), operands(BASE, torch.float32))
    table = rows.clone().requires_grad_()
    tensors = operands(BASE, torch.float32)
    out, _ = flash_attn_func(*tensors, score_mod=lambda s, b, h, i, j: s + table[i] @ columns[j])
    exact_table = rows.double().requires_grad_()
    exact, _ = attention(*tensors, torch.float64, score_mod=lambda s, b, h, i, j:
                         s + (exact_table[i] * columns.double()[j]).sum(-1))  # fmt: skip
    ours, theirs = (torch.autograd.grad(x.square().sum(), y)[0] for x, y in ((out, table), (exact, exact_table)))
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-4)


def test_functions_that_write_to_their_arguments():
    """They get numbers of their own: what others see, and what the next block sees, stays."""

    def in_place(score, b, h, q_idx, kv_idx):
        h += 1
        kv_idx -= 3
        twice = score.mul_(2)
        return (twice * twice).mul_(0.25).add_(h * (kv_idx - q_idx), alpha=0.125)

    def mask_in_place(b, h, q_idx, kv_idx):
        kv_idx -= 16
        return kv_idx <= q_idx

    def slope_in_place(dscore, score, b, h, q_idx, kv_idx):
        return dscore.mul_(score.mul_(2))

    def same(score, b, h, q_idx, kv_idx):
        return score * score + 0.125 * (h + 1) * (kv_idx - 3 - q_idx)

    exact = by_formula(score_mod=same, mask_mod=causal_mask)
    for more in ({}, {"score_mod_bwd": slope_in_place}):
        ours = with_lse(score_mod=in_place, mask_mod=mask_in_place, **more)
        check(ours, exact, operands(BASE, torch.float32))


def test_what_a_function_reads_must_not_change():
    """Before the gradient is computed: it would be that of another function."""
    table, documents, lengths = SLOPES.clone(), DOCUMENTS.clone(), torch.tensor([53, 40], dtype=torch.int32)
    q, k, v = (x.requires_grad_() for x in operands(BASE, torch.float32))
    for written in (None, table, documents, lengths):
        out, _ = flash_attn_varlen_func(
            q, k, v, seqused_k=lengths, score_mod=lambda s, b, h, i, j: s * table[h],
            mask_mod=lambda b, h, i, j: documents[b, i] == documents[b, j],
        )  # fmt: skip
        if written is None:
            out.sum().backward()
            continue
        written += 1
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()
        written -= 1


def test_how_functions_are_called():
    """Those whose operations are pointwise, or look numbers up, by broadcasting; all others by torch.vmap."""
    from flash_attn._engines.torch.mods import Evaluation, Tables

    info = Tables(*(torch.zeros(2, dtype=torch.int64) for _ in range(4)))
    table, row = torch.randn(4, 90), torch.randn(4)

    def broadcasts(mod):
        function = lambda *x: mod(*x[:-1])  # noqa: E731
        return Evaluation(function, "score_mod", torch.float32, info).fastest(1).broadcasts

    assert all(broadcasts(mods["score_mod"]) for mods in MODS.values() if "score_mod" in mods)
    assert broadcasts(lambda s, b, h, i, j: s + table[h, i - j + 40] * row[0] + row[h])
    assert broadcasts(lambda s, b, h, i, j: torch.where(i > j, s.float(), torch.zeros_like(s)))
    for mod in (
        lambda s, b, h, i, j: s + row,  # of a shape that would broadcast
        lambda s, b, h, i, j: s.max(),
        lambda s, b, h, i, j: s + table[h][i],
        lambda s, b, h, i, j: s.softmax(-1),
        lambda s, b, h, i, j: s.flip(0),
        lambda s, b, h, i, j: s.add_(1),
        lambda s, b, h, i, j: s if i > j else -s,  # which torch.vmap refuses
        lambda s, b, h, i, j: s[0],
        lambda s, b, h, i, j: s / i.numel(),
        lambda s, b, h, i, j: s + len(s.shape),
        lambda s, b, h, i, j: torch.ones(2, 2, 2, 2),
    ):
        assert not broadcasts(mod)
    reached = []

    def rows(s, b, h, i, j):
        row = table[h]  # of blocks it is another operation, and what follows might look outside
        reached.append(row)
        return s + row[i - j + 40]

    assert not broadcasts(rows) and not reached


def test_score_mod_bwd_is_the_gradient():
    q, k, v = (x.requires_grad_() for x in operands(BASE, torch.float32))
    options = {"score_mod": lambda s, b, h, i, j: s * s, "mask_mod": causal_mask}
    out, _ = flash_attn_func(q, k, v, **options)
    out_2, _ = flash_attn_func(q, k, v, **options, score_mod_bwd=lambda ds, s, b, h, i, j: 2 * s * ds)
    for a, b in zip(
        torch.autograd.grad(out.sum(), (q, k, v)), torch.autograd.grad(out_2.sum(), (q, k, v)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    table = torch.zeros(96, requires_grad=True)
    with pytest.raises(NotImplementedError, match="score_mod_bwd: gives no gradient of the tensors"):
        flash_attn_func(
            q, k, v, score_mod=lambda s, b, h, i, j: s + table[j], score_mod_bwd=lambda ds, s, b, h, i, j: ds
        )


@pytest.mark.parametrize("blocks", [False, True])
def test_mods_of_packed_sequences(blocks):
    """Positions are those within a sequence; seqlen_info finds the rows of packed tables."""
    tensors, cu_q, cu_k = packed(torch.float32)
    label = torch.randint(0, 3, (sum(LENGTHS_K),), generator=generator(4))
    table = torch.randn(4, 19, generator=generator(3))

    def mask(b, h, i, j, info, aux):
        return (j <= i) & (label[info.offset_k + j] < 2) & (j < info.seqlen_k)

    from flash_attn.cute.compute_block_sparsity import compute_block_sparsity

    tables = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k}
    lists = None
    if blocks:
        sizes = (8, 4, 4, 4, 19, 30)
        lists = compute_block_sparsity(*sizes, mask_mod=mask, aux_tensors=None, device=device.DEVICE, **tables)
        assert lists.cu_total_m_blocks.tolist() == [0, 2, 2, 5, 6] and lists.block_size == (8, 4)
        assert lists.cu_block_idx_offsets.tolist() == [0, 4, 4, 28, 30]

    def ours(q, k, v, table):
        mod = lambda s, b, h, i, j: s + table[h, i]  # noqa: E731
        options = {"score_mod": mod, "mask_mod": mask, "block_sparse_tensors": lists, **tables}
        return flash_attn_varlen_func(q, k, v, **options, return_lse=True)

    def formula(dtype):
        def attend(q, k, v, table):
            outs, lses = [], []
            for i0, i1, j0, j1 in zip(cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:], strict=True):
                here = label[j0:j1]
                out, lse = attention(
                    q[None, i0:i1], k[None, j0:j1], v[None, j0:j1], dtype,
                    score_mod=lambda s, b, h, i, j: s + table.to(s.dtype)[h, i],
                    mask_mod=lambda b, h, i, j, here=here: (j <= i) & (here[j] < 2),
                )  # fmt: skip
                outs.append(out[0])
                lses.append(lse[0])
            return torch.cat(outs), torch.cat(lses, 1)

        return attend

    check(ours, formula, tensors, {"table": table})


def test_values_that_a_row_does_not_see():
    q, k, v = operands(BASE, torch.float32)
    k[:, 40:], v[:, 40:] = torch.nan, torch.inf
    mask = lambda b, h, i, j: (j <= i) & (j < 40)  # noqa: E731
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, lse = flash_attn_func(*leaves, mask_mod=mask, return_lse=True)
    short = flash_attn_func(q, k[:, :40], v[:, :40], mask_mod=mask, return_lse=True)
    torch.testing.assert_close((out, lse), short, rtol=1e-6, atol=1e-6)
    grads = torch.autograd.grad(out.sum(), leaves)
    assert all(torch.isfinite(g).all() for g in grads) and not grads[2][:, 40:].any()


def test_flex_attention_says_the_same():
    flex = pytest.importorskip("torch.nn.attention.flex_attention")
    q, k, v = operands((2, 53, 53, 4, 2, 16, 16), torch.float32)
    for name in ("alibi", "documents", "prefix", "both", "some heads"):
        mods = MODS[name]
        block_mask = None
        if "mask_mod" in mods:
            block_mask = flex.create_block_mask(mods["mask_mod"], 2, 4, 53, 53, device=device.DEVICE, BLOCK_SIZE=16)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about running uncompiled
            theirs = flex.flex_attention(
                *(x.transpose(1, 2) for x in (q, k, v)), score_mod=mods.get("score_mod"), block_mask=block_mask,
                enable_gqa=True,
            ).transpose(1, 2)  # fmt: skip
        torch.testing.assert_close(flash_attn_func(q, k, v, **mods)[0], theirs, rtol=1e-5, atol=1e-5)


@device.cpu_only("counts its memory")
def test_memory_is_linear():
    """No temporary of all scores, forward or backward."""
    q, k, v = (x.requires_grad_() for x in operands((1, 2048, 2048, 1, 1, 8, 8), torch.float32))
    with torch.profiler.profile(profile_memory=True) as profile:
        out, _ = flash_attn_func(q, k, v, **MODS["causal"], score_mod=lambda s, b, h, i, j: s - 0.01 * (i - j).abs())
        out.sum().backward()
    largest_of_an_op = max(e.self_cpu_memory_usage for e in profile.events())
    assert 0 < largest_of_an_op <= 4 * 2048 * 2048 / 8, largest_of_an_op
