"""What the adapter calls of FlagGems 5.0.2, for machines that it does not run on: same signature, same answers.

The host code of FlagGems is followed where its answers differ from the core's; scores are the formula in double. What
FlagGems leaves as it was is NaN here.
"""

from __future__ import annotations

import contextlib
import sys
import types
from importlib.machinery import ModuleSpec

import flash_attn
import pytest
import torch
from flash_attn._engines.builtin import BUILT_IN

calls: list[dict] = []  # the arguments of every call, as they came


def flash_attn_varlen_func(
    q,
    k,
    v,
    max_seqlen_q,
    cu_seqlens_q,
    max_seqlen_k,
    cu_seqlens_k=None,
    seqused_k=None,
    q_v=None,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=None,
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
    return_softmax_lse=False,
    out=None,
    scheduler_metadata=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    s_aux=None,
    num_splits: int = 0,
    cp_world_size: int = 1,
    cp_rank: int = 0,
    cp_tot_seqused_k=None,
    fa_version: int = 2,
):
    calls.append(dict(locals()))
    assert q.dtype in (torch.float16, torch.bfloat16) and q.dtype == k.dtype == v.dtype == out.dtype
    assert q.stride(-1) == k.stride(-1) == out.stride(-1) == 1 and k.stride() == v.stride() and k.shape == v.shape
    assert (cu_seqlens_k is None) != (seqused_k is None) and (block_table is None or seqused_k is not None)
    for table in (cu_seqlens_q, cu_seqlens_k, seqused_k, block_table):
        assert table is None or table.dtype == torch.int32 and table.stride(-1) == 1
    assert block_table is not None or cu_seqlens_k is not None, "k_bos is not defined"
    batch, (total, nheads, headdim), nheads_k = cu_seqlens_q.numel() - 1, q.shape, k.shape[-2]
    assert out.shape == q.shape and headdim <= 256 and headdim % 8 == 0 and dropout_p == 0
    assert alibi_slopes is None or alibi_slopes.shape in ((nheads,), (batch, nheads)) and alibi_slopes.stride(-1) == 1
    left, right = window_size or (-1, -1)
    if max_seqlen_q == 1 and alibi_slopes is None:
        causal = False
    if causal:
        right = 0
    left, right = (-1 if side >= max_seqlen_k else side for side in (left, right))
    swapped = max_seqlen_q == 1 and alibi_slopes is None and nheads > nheads_k and left < 0 and right < 0
    if swapped:  # q is reshaped to (batch, nheads_k, group, headdim)
        assert total == batch
        cu_seqlens_q = torch.arange(batch + 1, dtype=torch.int32)
    lse = torch.full((nheads, total), torch.nan)
    for b in range(batch):
        rows = slice(int(cu_seqlens_q[b]), int(cu_seqlens_q[b + 1]))
        seqlen_q = rows.stop - rows.start
        if seqlen_q <= 0:
            continue
        assert seqlen_q <= max_seqlen_q
        slopes = alibi_slopes if alibi_slopes is None or alibi_slopes.dim() == 1 else alibi_slopes[b]
        keys = _rows_of_keys(b, k, cu_seqlens_k, seqused_k, block_table)
        scores = (softcap, softmax_scale, causal, left, right, slopes)
        out[rows], lse[:, rows] = _attend(q[rows], _flat(k)[keys], _flat(v)[keys], *scores)
    if swapped:  # (nheads_k, batch, group) is taken for (nheads, batch)
        lse = lse.view(nheads_k, -1, batch).transpose(1, 2).reshape(nheads, batch)
    return (out, lse) if return_softmax_lse else out


def _flat(x):
    """(rows, heads, headdim) of all memory from the first element on: pages are found by the stride of a row alone."""
    if x.dim() == 3:
        return x
    rows = 1 + sum((n - 1) * s for n, s in zip(x.shape[:2], x.stride()[:2], strict=True)) // x.stride(1)
    return x.as_strided((rows, *x.shape[2:]), x.stride()[1:])


def _rows_of_keys(b, k, cu_seqlens_k, seqused_k, block_table):
    if block_table is None:
        return torch.arange(int(cu_seqlens_k[b]), int(cu_seqlens_k[b + 1]))
    key, size = torch.arange(int(seqused_k[b])), k.shape[1]
    return block_table[b, key // size].long() * size + key % size


def _attend(q, k, v, softcap, scale, causal, left, right, slopes):
    """q (seqlen_q, nheads, headdim) -> out, lse (nheads, seqlen_q)."""
    seqlen_q, seqlen_k, group = q.shape[0], k.shape[0], q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(group, 1) for x in (k, v))
    s = torch.einsum("ihd,jhd->hij", q.double(), k) * scale
    if softcap > 0:
        s = softcap * torch.tanh(s / softcap)
    key = torch.arange(seqlen_k)
    position = torch.arange(seqlen_q)[:, None] + seqlen_k - seqlen_q
    if slopes is not None:
        distance = key[None] - seqlen_k + 1 if causal else -(key - position).abs()
        s = s + slopes.double()[:, None, None] * distance
    hidden = torch.zeros(seqlen_q, seqlen_k, dtype=torch.bool)
    if causal or left >= 0:
        hidden |= key > position + right
    if left >= 0:
        hidden |= key < position - left
    s = s.masked_fill(hidden, -torch.inf)
    lse = s.logsumexp(-1) if seqlen_k else s.new_full(s.shape[:2], -torch.inf)
    p = torch.exp(s - lse.masked_fill(lse == -torch.inf, 0.0)[..., None])
    return torch.einsum("hij,jhd->ihd", p, v).to(q.dtype), lse.masked_fill(lse == -torch.inf, torch.inf).float()


def module(name: str, **attributes) -> types.ModuleType:
    made = types.ModuleType(name)
    made.__spec__ = ModuleSpec(name, None)
    vars(made).update(attributes)
    return made


@contextlib.contextmanager
def installed(function=flash_attn_varlen_func, version="5.0.2", triton="3.6.0", vendor="nvidia", **settings):
    """flag_gems with `function` in it, and the backend registered for the CPU. `settings`: of register_backend."""
    attributes = {"vendor_name": vendor, "device": "cpu", "flash_attn_varlen_func": function}
    calls.clear()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(sys.modules, "flag_gems", module("flag_gems", __version__=version, **attributes))
            patch.setitem(sys.modules, "triton", module("triton", __version__=triton))
            flash_attn.register_backend("flaggems", **{**BUILT_IN["flaggems"], "devices": ("cpu",), **settings})
            yield
    finally:
        flash_attn.unregister_backend("flaggems")
        flash_attn.register_backend("flaggems", **BUILT_IN["flaggems"])
