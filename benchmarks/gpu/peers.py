"""Who is measured. A contender is `make(cell, inputs) -> forward(q, k, v)`; where it cannot, it raises in words."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import flash_attn
import mods
import torch
from cells import Cell, Inputs
from torch.nn.functional import scaled_dot_product_attention


class Unserved(Exception):
    """Why a contender has no entry for a cell."""


@dataclass(frozen=True)
class Contender:
    name: str
    make: Callable[[Cell, Inputs], Callable]
    context: Callable[[], AbstractContextManager] = contextlib.nullcontext  # around every call
    serves: Callable[[Cell], bool] = lambda cell: True  # silently: shapes that it is not asked for


# ---- Ours ------------------------------------------------------------------------------------------------------------


def _ours(cell: Cell, x: Inputs) -> Callable:
    if cell.mod:
        return _with_mod(cell, x)
    if cell.page_size:
        table = {"cache_seqlens": x.used, "block_table": x.pages}

        def forward(q, k, v):
            pool = (t.view(-1, cell.page_size, *t.shape[2:]) for t in (k, v))
            return flash_attn.flash_attn_with_kvcache(q, *pool, **table)

        return forward
    if cell.name == "decode":
        return lambda q, k, v: flash_attn.flash_attn_with_kvcache(q, k, v, cache_seqlens=x.used)
    if cell.lengths:
        rest = (x.cu_seqlens, x.cu_seqlens, cell.seqlen_q, cell.seqlen)
        return lambda q, k, v: flash_attn.flash_attn_varlen_func(q, k, v, *rest, causal=cell.causal)
    return lambda q, k, v: flash_attn.flash_attn_func(q, k, v, causal=cell.causal)


def _with_mod(cell: Cell, x: Inputs) -> Callable:
    from flash_attn.cute import flash_attn_func
    from flash_attn.cute.compute_block_sparsity import compute_block_sparsity

    mod, device = mods.of(cell, x.q.device.type), x.q.device
    options = {"score_mod": mod.score, "mask_mod": mod.mask}
    if mod.lists:
        options["block_sparse_tensors"] = compute_block_sparsity(
            128, 128, 1, 1, cell.seqlen_q, cell.seqlen, mod.mask, None, device
        )
    return lambda q, k, v: flash_attn_func(q, k, v, **options)[0]


def ours(backend: str | None) -> Contender:
    """`plus` is the automatic choice, `plus:triton` a backend by its name."""
    return Contender(f"plus:{backend}" if backend else "plus", _ours, lambda: flash_attn.use_backend(backend))


def _rows_in_order(cell: Cell, x: Inputs) -> Callable:
    """Beside a call on pages, the same on the same rows one after the other: gathered before, which is not timed."""
    order = {}

    def forward(q, k, v):
        if k.data_ptr() not in order:
            order[k.data_ptr()] = [
                t.view(-1, cell.page_size, *t.shape[2:])[x.pages.long()].view(t.shape) for t in (k, v)
            ]
        return flash_attn.flash_attn_with_kvcache(q, *order[k.data_ptr()], cache_seqlens=x.used)

    return forward


def _by_option(cell: Cell, x: Inputs) -> Callable:
    """Beside a call with a function of scores: the option that says the same."""
    option = mods.of(cell, x.q.device.type).option
    if option is None:
        raise Unserved("no option says the same")
    return lambda q, k, v: flash_attn.flash_attn_func(q, k, v, **option)


OPTION = Contender("plus_option", _by_option, serves=lambda cell: bool(cell.mod))
UNPAGED = Contender("plus_unpaged", _rows_in_order, serves=lambda cell: cell.page_size > 0)


def chosen(cell: Cell, x: Inputs) -> str:
    """The backend that the automatic choice takes."""
    q, k, v = (t.detach() for t in (x.q, x.k, x.v))
    sequences = () if x.cu_seqlens is None else (x.cu_seqlens, x.cu_seqlens, cell.seqlen_q, cell.seqlen)
    mod = mods.of(cell, q.device.type) if cell.mod else mods.Mod()
    call = flash_attn.explain(q, k, v, *sequences, causal=cell.causal, seqused_k=x.used, score_mod=mod.score,
                              mask_mod=mod.mask, backward=cell.name == "backward")  # fmt: skip
    return next((c.backend for c in call.candidates if c.chosen), "")


def _is_plain(cell: Cell) -> bool:
    return not cell.page_size and not cell.mod


# ---- PyTorch's -------------------------------------------------------------------------------------------------------


def _sdpa(cell: Cell, x: Inputs) -> Callable:
    if cell.lengths:
        raise Unserved("scaled_dot_product_attention takes no cu_seqlens")
    options = {"is_causal": cell.causal, "enable_gqa": cell.nheads != cell.nheads_k}

    def forward(q, k, v):
        return scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), **options).transpose(1, 2)

    return forward


def _torch_fa2(cell: Cell, x: Inputs) -> Callable:
    if not cell.lengths:
        return _sdpa(cell, x)
    rest = (x.cu_seqlens, x.cu_seqlens, cell.seqlen_q, cell.seqlen, 0.0, cell.causal, False)
    group = cell.nheads // cell.nheads_k
    if group > 1:
        raise Unserved("PyTorch's packed FlashAttention-2 has no grouped heads")
    return lambda q, k, v: torch.ops.aten._flash_attention_forward(q, k, v, *rest)[0]


def _kernel(name: str) -> AbstractContextManager:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel(getattr(SDPBackend, name))


@functools.cache
def _flex_compiled() -> Callable:
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.config.cache_size_limit = 512  # a compilation for each cell
    return torch.compile(flex_attention, dynamic=False)


def _is_seen(b, h, i, j):
    return i >= j


def _flex(cell: Cell, x: Inputs) -> Callable:
    from torch.nn.attention.flex_attention import create_block_mask

    device = x.q.device.type
    mod = mods.of(cell, device) if cell.mod else mods.Mod(mask=_is_seen if cell.causal else None)
    mask = None
    if mod.mask:
        mask = create_block_mask(mod.mask, None, None, cell.seqlen_q, cell.seqlen, device=device)
    run = partial(_flex_compiled(), score_mod=mod.score, block_mask=mask, enable_gqa=cell.nheads != cell.nheads_k)
    return lambda q, k, v: run(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)


def _flex_serves(cell: Cell) -> bool:
    """Long square shapes only: each cell costs a compilation."""
    return cell.seqlen_q == cell.seqlen == 8192 and cell.headdim < 256


# ---- Others, where installed -----------------------------------------------------------------------------------------


def _flag_gems(cell: Cell, x: Inputs) -> Callable:
    flag_gems = importlib.import_module("flag_gems")
    if cell.name == "backward":
        if cell.lengths:
            raise Unserved("FlagGems has no gradient of packed sequences")
        options = {"is_causal": cell.causal, "enable_gqa": cell.nheads != cell.nheads_k}
        sdpa = flag_gems.scaled_dot_product_attention
        return lambda q, k, v: sdpa(*(t.transpose(1, 2) for t in (q, k, v)), **options).transpose(1, 2)
    if cell.lengths:
        cu = {"cu_seqlens_q": x.cu_seqlens, "cu_seqlens_k": x.cu_seqlens, "causal": cell.causal}
        longest = {"max_seqlen_q": cell.seqlen_q, "max_seqlen_k": cell.seqlen}
        return lambda q, k, v: flag_gems.flash_attn_varlen_func(q, k, v, **cu, **longest)
    dense = importlib.import_module("flag_gems.ops.attention").flash_attention_forward
    rest = (None, None, cell.seqlen_q, cell.seqlen, 0.0, cell.causal, False)
    return lambda q, k, v: dense(q, k, v, *rest, scale=cell.headdim**-0.5)[0]


def _first(result):
    return result[0] if isinstance(result, tuple) else result


def _fa4(cell: Cell, x: Inputs) -> Callable:
    cute = importlib.import_module("flash_attn.cute")
    if cell.lengths:
        rest = {"cu_seqlens_q": x.cu_seqlens, "cu_seqlens_k": x.cu_seqlens, "causal": cell.causal}
        return lambda q, k, v: _first(cute.flash_attn_varlen_func(q, k, v, **rest))
    return lambda q, k, v: _first(cute.flash_attn_func(q, k, v, causal=cell.causal))


PEERS = (
    Contender("torch_fa2", _torch_fa2, lambda: _kernel("FLASH_ATTENTION"), _is_plain),
    Contender("torch_cudnn", _sdpa, lambda: _kernel("CUDNN_ATTENTION"), _is_plain),
    Contender("torch_flex", _flex, serves=_flex_serves),
    Contender("flaggems", _flag_gems, serves=_is_plain),
    Contender("fa4", _fa4, serves=_is_plain),
)


def absent(name: str, device: str) -> str:
    """Why a peer cannot run here at all; empty if it may."""
    if device == "cpu" and name != "torch_fa2":  # PyTorch's FlashAttention has a CPU kernel
        return "needs an accelerator"
    # By distribution: the module flash_attn.cute is there without flash-attn-4, and ours.
    distribution = {"flaggems": "flag-gems", "fa4": "flash-attn-4"}.get(name)
    if distribution:
        try:
            importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            return f"{distribution} is not installed"
    return ""


def versions() -> dict[str, str]:
    found = {}
    for name in ("torch", "triton", "flash-attention-plus", "flag-gems", "flash-attn-4"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found | {"torch": torch.__version__, "cuda": torch.version.cuda, "flash_attn": flash_attn.__plus_version__}
