"""Block-sparse masks of flash_attn.cute: what no list names is not computed, and the lists that a mask_mod makes."""

from __future__ import annotations

import pytest
import torch
from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch, fast_sampling
from flash_attn.cute.compute_block_sparsity import compute_block_sparsity
from flash_attn.cute.interface import _flash_attn_bwd, flash_attn_func, flash_attn_varlen_func
from support.device import DEVICE, cpu_only, generator
from support.formula import attention

pytestmark = pytest.mark.device

BATCH, SEQLEN_Q, SEQLEN_K, NHEADS, NHEADS_K = 2, 70, 100, 4, 2
BLOCK = (16, 24)
M, N = 5, 5  # blocks of rows and of keys


def operands(dtype=torch.float32):
    g = generator(0)
    sizes = ((SEQLEN_Q, NHEADS), (SEQLEN_K, NHEADS_K), (SEQLEN_K, NHEADS_K))
    return [torch.randn(BATCH, *size, 16, generator=g).to(dtype) for size in sizes]


def lists(partial, full=None, block_size=BLOCK):
    """Of bool tensors (..., M, N)."""

    def pair(kind):
        return kind.sum(-1).int(), torch.argsort(kind.int(), dim=-1, descending=True, stable=True).int()

    return BlockSparseTensorsTorch(
        *pair(partial), *((None, None) if full is None else pair(full)), block_size=block_size
    )


def by_score(blocks):
    """(..., M, N) of blocks -> of scores."""
    return blocks.repeat_interleave(BLOCK[0], -2)[..., :SEQLEN_Q, :].repeat_interleave(BLOCK[1], -1)[..., :SEQLEN_K]


class Recorded:
    """A mask_mod that knows how often it was asked about a block. (A watched call finds out how it may be asked.)"""

    def __init__(self, mask_mod):
        self.mask_mod, self.calls = mask_mod, 0

    def __call__(self, b, h, q_idx, kv_idx):
        self.calls += torch._C._len_torch_dispatch_stack() == 0
        return self.mask_mod(b, h, q_idx, kv_idx)


def some(b, h, i, j):
    return (i + 2 * j + h) % 3 > 0


def random_blocks(batch, nheads):
    g = generator(batch + 2 * nheads)
    kinds = torch.randint(0, 3, (batch, nheads, M, N), generator=g)
    kinds[:, :, 2] = 0  # rows that see nothing
    kinds[:, :, :, 3] = 0  # keys that nobody sees
    return kinds == 1, kinds == 2


def results(function, tensors):
    leaves = [x.clone().requires_grad_() for x in tensors]
    out, lse = function(*leaves)
    g = generator(5)
    dout, dlse = (torch.randn(x.shape, generator=g).to(x.dtype) for x in (out, lse))
    loss = (out * dout).sum() + (torch.where(torch.isinf(lse), 0, lse) * dlse).sum()
    return [out.detach(), torch.where(lse == torch.inf, -torch.inf, lse).detach(), *torch.autograd.grad(loss, leaves)]


def exact(tensors, seen):
    """`seen`: (batch or 1, nheads or 1, seqlen_q, seqlen_k) bool."""
    seen = seen.expand(BATCH, NHEADS, -1, -1)
    mask = {"mask_mod": lambda b, h, i, j: seen[b, h, i, j]}
    return results(lambda q, k, v: attention(q, k, v, torch.float64, **mask), [x.double() for x in tensors])


def assert_close(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("nheads", [1, NHEADS])
@pytest.mark.parametrize("batch", [1, BATCH])
def test_lists(batch, nheads):
    partial, full = random_blocks(batch, nheads)
    mask = Recorded(some)
    options = {"mask_mod": mask, "block_sparse_tensors": lists(partial, full), "return_lse": True}
    tensors = operands()
    ours = results(lambda *x: flash_attn_func(*x, **options), tensors)
    index = torch.meshgrid(*(torch.arange(n) for n in (1, NHEADS, SEQLEN_Q, SEQLEN_K)), indexing="ij")
    seen = by_score(full) | (by_score(partial) & some(*index))
    assert_close(ours, exact(tensors, seen))
    assert not ours[0][:, 32:48].any() and not ours[3][:, 72:96].any()

    if DEVICE != "cpu":  # a kernel asks of itself
        return
    # Forward, the sums of the backward and its products ask once for each block that a list calls partial, of whichever
    # sequence or head of a group shares it. One call more tells which tensors it reads.
    together = partial.unflatten(1, (NHEADS_K, -1)).any(2) if nheads > 1 else partial
    assert mask.calls == 3 * int(together.sum()) + 1
    assert 0 < mask.calls < 3 * BATCH * NHEADS * M * N


@cpu_only("counts the products of the backend torch")
def test_what_no_list_names_is_not_computed():
    """Keys of blocks that are not listed are not multiplied: the products of a run are counted."""
    tensors = operands()
    partial = torch.zeros(1, 1, M, N, dtype=torch.bool)
    partial[..., 0] = True

    def products(**options):
        with torch.profiler.profile(record_shapes=False) as profile:
            flash_attn_func(*tensors, **options)
        return sum(e.count for e in profile.key_averages() if e.key == "aten::bmm")

    every = products(block_sparse_tensors=lists(torch.ones_like(partial)))
    one = products(block_sparse_tensors=lists(partial))
    assert every == N * one > 0


def test_full_blocks_need_no_mask_mod():
    tensors = operands()
    partial, full = random_blocks(1, 1)
    lists_of_full = lists(torch.zeros_like(partial), full)
    mask = Recorded(some)
    ours = results(
        lambda *x: flash_attn_func(*x, mask_mod=mask, block_sparse_tensors=lists_of_full, return_lse=True), tensors
    )
    assert mask.calls == 0
    assert_close(ours, exact(tensors, by_score(full)))
    # and without a mask_mod the two lists mean the same, within what causal leaves
    either = lists(partial, full)
    ours = results(lambda *x: flash_attn_func(*x, causal=True, block_sparse_tensors=either, return_lse=True), tensors)
    causal = torch.arange(SEQLEN_K) <= torch.arange(SEQLEN_Q)[:, None] + SEQLEN_K - SEQLEN_Q
    assert_close(ours, exact(tensors, by_score(partial | full) & causal))


def test_backward_alone_takes_lists_by_keys():
    tensors = operands()
    partial, full = random_blocks(BATCH, NHEADS)
    out, lse = flash_attn_func(*tensors, mask_mod=some, block_sparse_tensors=lists(partial, full), return_lse=True)
    leaves = [x.clone().requires_grad_() for x in tensors]
    ours, _ = flash_attn_func(*leaves, mask_mod=some, block_sparse_tensors=lists(partial, full),
                              block_sparse_tensors_bwd=lists(partial.mT, full.mT))  # fmt: skip
    want = torch.autograd.grad(ours.sum(), leaves)
    got = _flash_attn_bwd(*tensors, out, torch.ones_like(out), lse, mask_mod=some,
                          block_sparse_tensors=lists(partial.mT, full.mT))  # fmt: skip
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("nheads", [1, NHEADS])
def test_lists_that_a_mask_mod_makes(nheads):
    flex = pytest.importorskip("torch.nn.attention.flex_attention")

    def mask(b, h, i, j):
        return (j <= i + 20 * b) & (j > i - 50) & (h < 3)

    shape = (BATCH, nheads, SEQLEN_Q, SEQLEN_K)
    ours = compute_block_sparsity(16, 24, *shape, mask, None, DEVICE)
    theirs = flex.create_block_mask(mask, *shape, device=DEVICE, BLOCK_SIZE=BLOCK)
    assert ours.block_size == BLOCK
    names = ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices")
    for n in (0, 2):
        # But the last rows: theirs is never full where a block has fewer than 16.
        counts, indices = (getattr(theirs, name)[:, :, : M - 1] for name in names[n : n + 2])
        assert ours[n].dtype == ours[n + 1].dtype == torch.int32 and torch.equal(ours[n][..., :-1], counts)
        counted = torch.arange(N) < counts[..., None]
        assert torch.equal(ours[n + 1][:, :, :-1][counted], indices[counted])

    tensors = operands()
    dense, _ = flash_attn_func(*tensors, mask_mod=lambda b, h, i, j: mask(b, h if nheads > 1 else 0, i, j))
    for made in (
        ours,
        BlockSparseTensorsTorch(*(getattr(theirs, name) for name in names), block_size=theirs.BLOCK_SIZE),
    ):
        sparse, _ = flash_attn_func(*tensors, mask_mod=lambda b, h, i, j: mask(b, h if nheads > 1 else 0, i, j),
                                    block_sparse_tensors=made)  # fmt: skip
        torch.testing.assert_close(sparse, dense, rtol=1e-5, atol=1e-6)
    only_partial = compute_block_sparsity(16, 24, *shape, fast_sampling(mask), None, DEVICE, compute_full_blocks=False)
    assert only_partial.full_block_cnt is None and torch.equal(only_partial[0], ours[0] + ours[2])


def test_sizes_that_are_not_said():
    """Of 128 keys, and of as many rows as the number of blocks says."""
    q, k = torch.randn(1, 300, 1, 8), torch.randn(1, 200, 1, 8)
    block = torch.ones(1, 1, 3, 2, dtype=torch.bool)
    block[..., 1, 1] = False
    out, _ = flash_attn_func(q, k, k, block_sparse_tensors=lists(block, block_size=None))
    dense, _ = flash_attn_func(q, k, k, mask_mod=lambda b, h, i, j: ~((i // 128 == 1) & (j // 128 == 1)))
    torch.testing.assert_close(out, dense, rtol=1e-5, atol=1e-6)
    q = torch.randn(1, 1000, 1, 8)
    with pytest.raises(
        ValueError, match=r"block_size: required: 2 blocks of 1000 rows may have \[512, 640, 768, 896\]"
    ):
        flash_attn_func(q, k, k, block_sparse_tensors=lists(block[:, :, :2], block_size=None))


GOOD = lists(torch.ones(1, 1, M, N, dtype=torch.bool))
BAD = {
    "no lists": (3, TypeError, "expected a BlockSparseTensorsTorch"),
    "no counts": (GOOD._replace(mask_block_cnt=None), TypeError, "mask_block_cnt: expected a torch.Tensor"),
    "dtype": (GOOD._replace(mask_block_cnt=torch.ones(1, 1, M)), TypeError, "cnt: expected int32, got float32"),
    "dimensions": (GOOD._replace(mask_block_idx=GOOD.mask_block_idx[0]), ValueError, "idx: expected 4 dimensions"),
    "size": (GOOD._replace(block_size=(16, 0)), ValueError, "block_size: expected two positive integers"),
    "blocks": (GOOD._replace(block_size=(16, 48)), ValueError, r"mask_block_idx: expected .* at most 3\)"),
    "rows": (GOOD._replace(block_size=(32, 24)), ValueError, r"mask_block_cnt: expected \(2 or 1, 4 or 1, 3\)"),
    "heads": (GOOD._replace(mask_block_cnt=GOOD.mask_block_cnt.expand(1, 3, M)), ValueError, "block_cnt: expected"),
    "count": (GOOD._replace(mask_block_cnt=GOOD.mask_block_cnt + 1), ValueError, "mask_block_cnt: expected 0 to 5"),
    "index": (GOOD._replace(mask_block_idx=GOOD.mask_block_idx + 1), ValueError, "idx: expected blocks 0 to 4"),
    "twice": (GOOD._replace(mask_block_idx=GOOD.mask_block_idx * 0), ValueError, "names a block twice"),
    "both": (GOOD._replace(full_block_cnt=GOOD[0], full_block_idx=GOOD[1]), ValueError, "full_block_idx: names"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_refused(name):
    bad, kind, words = BAD[name]
    with pytest.raises(kind, match=words):
        flash_attn_func(*operands(), block_sparse_tensors=bad)


def test_tables_of_packed_lists_are_checked():
    q, k, _ = (x.flatten(0, 1) for x in operands())
    cu_q, cu_k = (torch.tensor([0, n, 2 * n], dtype=torch.int32) for n in (SEQLEN_Q, SEQLEN_K))
    made = compute_block_sparsity(16, 24, BATCH, 1, 0, 0, some, None, DEVICE, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)
    tables = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "mask_mod": some}
    out, _ = flash_attn_varlen_func(q, k, k, block_sparse_tensors=made, **tables)
    torch.testing.assert_close(out, flash_attn_varlen_func(q, k, k, **tables)[0], rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"cu_total_m_blocks: expected \[0, 5, 10\]"):
        flash_attn_varlen_func(q, k, k, block_sparse_tensors=made._replace(cu_total_m_blocks=cu_q), **tables)
    with pytest.raises(ValueError, match=r"mask_block_idx: expected \(4 or 1, 50\)"):
        bad = made._replace(mask_block_idx=made.mask_block_idx[:, 1:])
        flash_attn_varlen_func(q, k, k, block_sparse_tensors=bad, **tables)
    with pytest.raises(ValueError, match="tile_m, tile_n: expected at least 1"):
        compute_block_sparsity(0, 24, 1, 1, 5, 5, some, None, DEVICE)


def test_lists_are_read_again_when_they_have_changed():
    tensors = operands()
    made = lists(*random_blocks(1, 1))
    first = flash_attn_func(*tensors, block_sparse_tensors=made)[0]
    assert torch.equal(flash_attn_func(*tensors, block_sparse_tensors=made)[0], first)
    made.mask_block_cnt.zero_()
    made.full_block_cnt.zero_()
    assert not flash_attn_func(*tensors, block_sparse_tensors=made)[0].any() and first.any()
