"""Block-sparse masks: for every block of rows, the blocks of keys that count."""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

import torch
from torch import Tensor

from flash_attn._engines.torch.mods import BlockLists
from flash_attn._errors import InvalidArgument, InvalidType

BLOCK = 128  # rows and keys of a block where nothing else is said: FlashAttention-4's tile


class BlockSparseTensorsTorch(NamedTuple):
    """Lists of blocks; M and N are the numbers of blocks of rows and of keys. Counts and indices are int32.

    Of each block of rows, mask_block_idx[..., :mask_block_cnt] are the blocks of keys in which mask_mod decides, and
    full_block_idx[..., :full_block_cnt] those that count whole. What no list names is not computed.

        fixed lengths   counts (batch | 1, nheads | 1, M), indices (batch | 1, nheads | 1, M, at most N)
        packed queries  counts (nheads | 1, all M), indices (nheads | 1, sum of M * N): sequence b's blocks of rows
                        start at cu_total_m_blocks[b], its lists at cu_block_idx_offsets[b], of N places each

    block_size: rows and keys of a block; None: multiples of 128 rows, found by M, and 128 keys.
    dq_write_order, dq_write_order_full and spt order the sums of FlashAttention-4's backward. Ours needs no order.
    """

    mask_block_cnt: Tensor
    mask_block_idx: Tensor
    full_block_cnt: Tensor | None = None
    full_block_idx: Tensor | None = None
    cu_total_m_blocks: Tensor | None = None  # (batch + 1)
    cu_block_idx_offsets: Tensor | None = None  # (batch + 1)
    block_size: tuple[int, int] | None = None
    dq_write_order: Tensor | None = None
    dq_write_order_full: Tensor | None = None
    spt: bool | None = None


def fast_sampling(mask_mod):
    """A mask_mod whose blocks five scores would tell. Here every score is asked, so the mark changes nothing."""
    mask_mod.use_fast_sampling = True
    return mask_mod


def ceildiv(a: int, b: int) -> int:
    """a / b, rounded up: how many blocks of b there are in a."""
    return -(-a // b)


def is_block_sparsity_enabled(tensors: BlockSparseTensorsTorch) -> bool:
    """Whether there is a list."""
    return tensors.mask_block_cnt is not None or tensors.full_block_cnt is not None


def _host(name: str, x, dims: int) -> Tensor:
    if not isinstance(x, Tensor):
        raise InvalidType(f"{name}: expected a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in (torch.int32, torch.int64):
        raise InvalidType(f"{name}: expected int32, got {str(x.dtype)[6:]}")
    if x.dim() != dims:
        raise InvalidArgument(f"{name}: expected {dims} dimensions, got {tuple(x.shape)}")
    return x.detach().cpu().long()


def _pairs(tensors, name: str, dims: int):
    """-> (prefix, counts, indices, kind) of each list, on the CPU."""
    for prefix, kind in (("mask", BlockLists.PARTIAL), ("full", BlockLists.FULL)):
        counts, indices = (getattr(tensors, f"{prefix}_block_{what}") for what in ("cnt", "idx"))
        if counts is None and indices is None and prefix == "full":
            continue
        counts = _host(f"{name}.{prefix}_block_cnt", counts, dims)
        indices = _host(f"{name}.{prefix}_block_idx", indices, dims + (dims == 3))
        yield f"{name}.{prefix}_block", counts, indices, kind


def _write(kinds: Tensor, counts: Tensor, indices: Tensor, kind: int, prefix: str) -> None:
    """Into kinds (..., M, N), the lists counts (..., M), indices (..., M, n)."""
    N = kinds.shape[-1]
    if counts.numel() and (int(counts.min()) < 0 or int(counts.max()) > indices.shape[-1]):
        raise InvalidArgument(f"{prefix}_cnt: expected 0 to {indices.shape[-1]}, the places of a list")
    counts = counts.expand(kinds.shape[:-1])
    indices = indices.expand(*kinds.shape[:-1], indices.shape[-1])
    counted = torch.arange(indices.shape[-1], device="cpu") < counts[..., None]
    if (counted & ((indices < 0) | (indices >= N))).any():
        raise InvalidArgument(f"{prefix}_idx: expected blocks 0 to {N - 1}, of {N} of the keys")
    times = torch.zeros((*kinds.shape[:-1], N + 1), dtype=torch.int32, device="cpu")
    times.scatter_add_(-1, torch.where(counted, indices, N), torch.ones_like(indices, dtype=torch.int32))
    times = times[..., :N]
    if (times > 1).any() or ((times > 0) & (kinds != BlockLists.SKIPPED)).any():
        raise InvalidArgument(f"{prefix}_idx: names a block twice that counts once")
    kinds[times > 0] = kind


def _rows_of_block(M: int, seqlen_q: int, name: str) -> int:
    fits = [f * BLOCK for f in range(1, ceildiv(seqlen_q, BLOCK) + 1) if ceildiv(seqlen_q, f * BLOCK) == M]
    if M == 1 or len(fits) == 1:
        return max(fits, default=BLOCK)
    raise InvalidArgument(
        f"{name}.block_size: required: {M} blocks of {seqlen_q} rows may have {fits or 'no multiple of 128'} rows each"
    )


def _fixed(tensors, name: str, shape, by_keys: bool) -> BlockLists:
    batch, nheads, seqlen_q, seqlen_k = shape
    lists = list(_pairs(tensors, name, 3))
    size = tensors.block_size
    if size is None:
        rows = BLOCK if by_keys else _rows_of_block(lists[0][1].shape[2], seqlen_q, name)
        size = (rows, BLOCK)
    M, N = ceildiv(seqlen_q, size[0]), ceildiv(seqlen_k, size[1])
    listing, listed = (N, M) if by_keys else (M, N)
    for prefix, counts, indices, _ in lists:
        if counts.shape[0] not in (1, batch) or counts.shape[1] not in (1, nheads) or counts.shape[2] != listing:
            expected = f"({batch} or 1, {nheads} or 1, {listing})"
            raise InvalidArgument(f"{prefix}_cnt: expected {expected}, got {tuple(counts.shape)}; blocks are of {size}")
        fits = all(n in (1, m) for n, m in zip(indices.shape[:2], (batch, nheads), strict=True))
        if not fits or indices.shape[2] != listing or indices.shape[3] > listed:
            expected = f"({batch} or 1, {nheads} or 1, {listing}, at most {listed})"
            raise InvalidArgument(f"{prefix}_idx: expected {expected}, got {tuple(indices.shape)}")
    of = [max(x.shape[d] for _, *pair, _ in lists for x in pair) for d in (0, 1)]
    kinds = torch.zeros((*of, listing, listed), dtype=torch.uint8, device="cpu")
    for prefix, counts, indices, kind in lists:
        _write(kinds, counts, indices, kind, prefix)
    return BlockLists(kinds.mT.contiguous() if by_keys else kinds, size)


def _packed(tensors, name: str, nheads: int, seqlens_q: list[int], seqlens_k: list[int]) -> BlockLists:
    lists = list(_pairs(tensors, name, 2))
    size = tensors.block_size or (BLOCK, BLOCK)
    M, N = ([ceildiv(n, s) for n in seqlens] for seqlens, s in zip((seqlens_q, seqlens_k), size, strict=True))
    starts = torch.tensor([0, *M], device="cpu").cumsum(0)
    offsets = torch.tensor([0, *(m * n for m, n in zip(M, N, strict=True))], device="cpu").cumsum(0)
    for field, computed in (("cu_total_m_blocks", starts), ("cu_block_idx_offsets", offsets)):
        given = getattr(tensors, field)
        if given is not None and not torch.equal(_host(f"{name}.{field}", given, 1), computed):
            expected = f"expected {computed.tolist()} for blocks of {size}"
            raise InvalidArgument(f"{name}.{field}: {expected}, got {given.tolist()}")
    for prefix, counts, indices, _ in lists:
        for what, x, n in (("cnt", counts, int(starts[-1])), ("idx", indices, int(offsets[-1]))):
            if x.shape[0] not in (1, nheads) or x.shape[1] != n:
                raise InvalidArgument(f"{prefix}_{what}: expected ({nheads} or 1, {n}), got {tuple(x.shape)}")
    heads = max(x.shape[0] for _, *pair, _ in lists for x in pair)
    kinds = torch.zeros((len(M), heads, max(M, default=0), max(N, default=0)), dtype=torch.uint8, device="cpu")
    for b, (m, n) in enumerate(zip(M, N, strict=True)):
        for prefix, counts, indices, kind in lists:
            mine = indices[:, int(offsets[b]) : int(offsets[b + 1])].unflatten(1, (m, n)) if m * n else None
            if mine is not None:
                _write(kinds[b, :, :m, :n], counts[:, int(starts[b]) : int(starts[b + 1])], mine, kind, prefix)
    return BlockLists(kinds, size)


def _lengths(cu: Tensor | None, used: Tensor | None, n: int, batch: int) -> list[int]:
    lengths = [n] * batch if cu is None else (cu[1:] - cu[:-1]).tolist()
    return lengths if used is None else used.tolist()


_read: OrderedDict[tuple, tuple[BlockLists, tuple]] = OrderedDict()  # with the tensors, so that their ids stay theirs
_MOST = 16


def block_lists(tensors, name: str, q: Tensor, k: Tensor, sequences, by_keys: bool = False) -> BlockLists | None:
    """Reads the lists of a checked call; on a device that means to wait for it, once for lists that stay as they are.
    `by_keys`: they list, for every block of keys, blocks of rows, as those of FlashAttention-4's backward do."""
    if tensors is None:
        return None
    kept = tuple(x for x in (*tensors, *sequences) if isinstance(x, Tensor)) if isinstance(tensors, tuple) else ()
    if not kept or any(x.is_inference() for x in kept):  # which say nothing of what is written to them
        return _lists_of(tensors, name, q, k, sequences, by_keys)
    numbers = tuple(repr(x) for x in (*tensors, *sequences) if not isinstance(x, Tensor))
    key = (tuple((id(x), x._version) for x in kept), numbers, q.shape, k.shape, by_keys)
    if key not in _read:
        _read[key] = _lists_of(tensors, name, q, k, sequences, by_keys), kept
        while len(_read) > _MOST:
            _read.popitem(last=False)
    return _read[key][0]


def _lists_of(tensors, name: str, q: Tensor, k: Tensor, sequences, by_keys: bool) -> BlockLists:
    if not all(hasattr(tensors, field) for field in BlockSparseTensorsTorch._fields[:4]):
        raise InvalidType(f"{name}: expected a BlockSparseTensorsTorch, got {type(tensors).__name__}")
    size = tensors.block_size
    if size is not None and not (len(size) == 2 and all(isinstance(n, int) and n > 0 for n in size)):
        raise InvalidArgument(f"{name}.block_size: expected two positive integers (rows, keys), got {size!r}")
    s, table = sequences, sequences.block_table
    seqlen_k = k.shape[-3] if table is None else table.shape[1] * k.shape[1]
    if s.cu_seqlens_q is None:
        if s.cu_seqlens_k is not None:
            seqlen_k = max(_lengths(s.cu_seqlens_k, None, 0, q.shape[0]), default=0)
        lists = _fixed(tensors, name, (q.shape[0], q.shape[2], q.shape[1], seqlen_k), by_keys)
    elif by_keys:
        raise InvalidArgument(f"{name}: lists of packed sequences by keys are not defined")
    else:
        batch = s.cu_seqlens_q.numel() - 1
        seqlens_q = _lengths(s.cu_seqlens_q, s.seqused_q, 0, batch)
        seqlens_k = _lengths(s.cu_seqlens_k, s.seqused_k, seqlen_k, batch)
        lists = _packed(tensors, name, q.shape[-2], seqlens_q, seqlens_k)
    for d in (0, 1):  # lists that are the same for all are listed once
        first = lists.kinds[:1] if d == 0 else lists.kinds[:, :1]
        if lists.kinds.shape[d] > 1 and bool((lists.kinds == first).all()):
            lists.kinds = first
    return lists
