"""The lists of blocks that a mask_mod makes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flash_attn._engines.torch.mods import Evaluation, Tables
from flash_attn._errors import InvalidArgument
from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch, ceildiv
from flash_attn.cute.functions import adapted, check_aux_tensors

__all__ = ["compute_block_sparsity"]


def _kinds(allowed: Tensor, tile_n: int, N: int) -> tuple[Tensor, Tensor]:
    """allowed (1, H, rows, keys), of one block of rows -> whether blocks of keys count in part, and whole (1, H, N)."""
    padding = (0, N * tile_n - allowed.shape[-1])
    some = torch.nn.functional.pad(allowed.any(2), padding).unflatten(-1, (N, tile_n)).any(-1)
    every = torch.nn.functional.pad(allowed.all(2), padding, value=True).unflatten(-1, (N, tile_n)).all(-1)
    return some & ~every, every


def _packed_lists(kind: Tensor) -> tuple[Tensor, Tensor]:
    """bool (..., N) -> counts (...), indices (..., N): those that are set first, in order."""
    order = torch.argsort(kind.to(torch.uint8), dim=-1, descending=True, stable=True)
    return kind.sum(-1, dtype=torch.int32), order.to(torch.int32)


def compute_block_sparsity(
    tile_m: int,
    tile_n: int,
    batch_size: int,
    num_heads: int,
    seqlen_q: int,
    seqlen_k: int,
    mask_mod: Callable,
    aux_tensors: list | None,
    device,
    aux_scalars: tuple | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    cu_total_m_blocks: Tensor | None = None,
    cu_block_idx_offsets: Tensor | None = None,
    compute_full_blocks: bool = True,
    use_fast_sampling: bool = False,
) -> BlockSparseTensorsTorch:
    """Asks mask_mod about every score, tile_m rows at a time, and lists the blocks of tile_n keys that count.

    mask_mod        as of flash_attn_func: (b, h, q_idx, kv_idx[, aux_tensors]) -> bool
    num_heads       1: the same lists for all heads
    cu_seqlens_q    int32 (batch + 1): packed queries, lists packed as in BlockSparseTensorsTorch; then seqlen_q and,
                    with cu_seqlens_k or seqused_k, seqlen_k are bounds of no use, and the two cu_ tables are made here
    compute_full_blocks  False: no list of full blocks; mask_mod decides in all
    use_fast_sampling    accepted; every score is asked

    Lengths are read by the host. -> BlockSparseTensorsTorch on `device`.
    """
    check_aux_tensors(aux_tensors)
    ask_number = adapted("mask_mod", mask_mod, aux_tensors, aux_scalars)
    if ask_number is None:
        raise InvalidArgument("mask_mod: expected a function, got None")
    if min(tile_m, tile_n) < 1:
        raise InvalidArgument(f"tile_m, tile_n: expected at least 1, got {tile_m}, {tile_n}")

    def lengths(cu, used, n) -> list[int]:
        if used is not None:
            return used.tolist()
        return [n] * batch_size if cu is None else (cu[1:] - cu[:-1]).tolist()

    seqlens_q, seqlens_k = lengths(cu_seqlens_q, seqused_q, seqlen_q), lengths(cu_seqlens_k, seqused_k, seqlen_k)
    zeros = [0] * batch_size
    starts = [zeros if cu is None else cu[:-1].tolist() for cu in (cu_seqlens_q, cu_seqlens_k)]
    info = Tables(*(torch.tensor(x, device=device) for x in (seqlens_q, seqlens_k, *starts)))
    ask = Evaluation(ask_number, "mask_mod", torch.bool, info).fastest(0)
    heads = torch.arange(num_heads, device=device)
    packed = cu_seqlens_q is not None
    M, N = ceildiv(seqlen_q, tile_m), ceildiv(seqlen_k, tile_n)
    partial, full = [], []  # of sequences: (H, M, N)
    for b in range(batch_size):
        rows, keys = seqlens_q[b], seqlens_k[b]
        m, n = (ceildiv(rows, tile_m), ceildiv(keys, tile_n)) if packed else (M, N)
        kinds = torch.zeros((2, num_heads, m, n), dtype=torch.bool, device=device)

        for i in range(ceildiv(rows, tile_m) if keys else 0):
            q_idx = torch.arange(i * tile_m, min((i + 1) * tile_m, rows), device=device)
            where = (torch.tensor([b], device=device), heads, q_idx, torch.arange(keys, device=device))
            allowed = ask((), where).expand(1, num_heads, len(q_idx), keys)
            some, every = _kinds(allowed, tile_n, ceildiv(keys, tile_n))
            kinds[0, :, i, : some.shape[-1]], kinds[1, :, i, : some.shape[-1]] = some[0], every[0]
        if not compute_full_blocks:
            kinds = torch.stack([kinds.any(0), torch.zeros_like(kinds[1])])
        partial.append(kinds[0])
        full.append(kinds[1])

    def together(kinds: list[Tensor]) -> tuple[Tensor, Tensor]:
        if not packed:
            return _packed_lists(
                torch.stack(kinds) if kinds else torch.zeros((0, num_heads, M, N), dtype=torch.bool, device=device)
            )
        counts, indices = zip(*map(_packed_lists, kinds), strict=True)
        return torch.cat(counts, 1), torch.cat([x.flatten(1) for x in indices], 1)

    tables = (cu_total_m_blocks, cu_block_idx_offsets)
    if packed:
        sizes = ([x.shape[1] for x in partial], [x.shape[1] * x.shape[2] for x in partial])
        made = (torch.tensor([0, *x], device=device).cumsum(0).int() for x in sizes)
        tables = tuple(x if given is None else given for x, given in zip(made, tables, strict=True))
    no_list = (None, None)
    return BlockSparseTensorsTorch(
        *together(partial), *(together(full) if compute_full_blocks else no_list), *tables, (tile_m, tile_n)
    )
