"""What is measured: the shapes, the operations and bytes of each, and its tensors."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import accumulate

import mods
import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Cell:
    name: str  # "forward", "backward" or "decode"
    batch: int
    nheads: int
    nheads_k: int
    seqlen_q: int
    seqlen: int  # of the keys
    headdim: int
    causal: bool
    lengths: tuple[int, ...] = ()  # varlen: of queries and keys; seqlen is then the longest
    is_quick: bool = False
    page_size: int = 0  # decode: keys in pages of so many rows, anywhere in a pool; 0: one after the other
    mod: str = ""  # a function of scores, or a mask as a function: mods.py

    def __str__(self) -> str:
        heads = f"{self.nheads}" if self.nheads == self.nheads_k else f"{self.nheads}:{self.nheads_k}"
        rows = f"{self.seqlen}" if self.seqlen_q == self.seqlen else f"{self.seqlen_q} x {self.seqlen}"
        words = f"{self.name} batch {self.batch} heads {heads} seqlen {rows} headdim {self.headdim}"
        words += (" causal" if self.causal else "") + (" varlen" if self.lengths else "")
        words += f" pages of {self.page_size}" if self.page_size else ""
        return words + (f" mod {self.mod}" if self.mod else "")

    @property
    def flops(self) -> float:
        """Two products forward, five backward, of the scores that a mask leaves."""
        pairs = sum(n * n for n in self.lengths) if self.lengths else self.batch * self.seqlen_q * self.seqlen
        products = 10 if self.name == "backward" else 4
        seen = 0.5 if self.causal else mods.SEEN.get(self.mod, 1.0)
        return products * pairs * self.nheads * self.headdim * seen

    @property
    def cache_bytes(self) -> int:
        """Of K and V, which one step of decoding reads once."""
        return 2 * 2 * self.batch * self.seqlen * self.nheads_k * self.headdim


def _lengths(total: int, longest: int) -> tuple[int, ...]:
    """Ragged lengths of that sum, as documents have them: many short ones, few long ones."""
    generator, lengths = random.Random(1), []
    while (left := total - sum(lengths)) > 0:
        lengths.append(min(left, max(1, round(longest * generator.random() ** 3))))
    return tuple(lengths)


def _varlen(name: str, lengths: tuple[int, ...], nheads: int, nheads_k: int, headdim: int, causal: bool, quick: bool):
    return Cell(name, len(lengths), nheads, nheads_k, max(lengths), max(lengths), headdim, causal, lengths, quick)


PASSES = ("forward", "backward")
# FlashAttention-3's setting: 16384 tokens in all, hidden size 2048.
TABLE = [
    Cell(name, 16384 // n, 2048 // d, 2048 // d, n, n, d, causal, is_quick=n in (1024, 8192) and (d < 256 or n == 8192))
    for name in PASSES
    for d in (64, 128, 256)
    for causal in (False, True)
    for n in (512, 1024, 2048, 4096, 8192, 16384)
]
VARLEN = [
    _varlen(name, lengths, heads, heads_k, d, causal, quick)
    for name in PASSES
    for lengths, heads, heads_k, d, causal, quick in (
        (_lengths(16384, 4096), 16, 16, 128, True, True),
        (_lengths(16384, 4096), 32, 32, 64, False, False),
        (_lengths(16384, 512), 32, 8, 128, True, False),
        ((1024,) * 16, 16, 16, 128, True, False),
    )
]
DECODE = [
    Cell("decode", batch, heads, heads_k, 1, n, d, False, is_quick=n in (65536, 8192, 2048))
    for batch, heads, heads_k, n, d in (
        (1, 32, 8, 65536, 128), (16, 32, 8, 8192, 128), (128, 32, 8, 4096, 128), (64, 64, 8, 8192, 128),
        (16, 16, 1, 8192, 128), (128, 32, 8, 1024, 64), (1, 32, 8, 4096, 128), (4, 32, 8, 2048, 128),
    )
]  # fmt: skip
PAGED = [
    Cell("decode", batch, heads, heads_k, 1, n, d, False, is_quick=page_size in (16, 64), page_size=page_size)
    for batch, heads, heads_k, n, d in ((16, 32, 8, 8192, 128), (128, 32, 8, 1024, 64))
    for page_size in (16, 64, 256)
]
SHORT_AND_GQA = [
    Cell(name, batch, heads, heads_k, n, n, d, causal, is_quick=quick)
    for name in PASSES
    for batch, heads, heads_k, n, d, causal, quick in (
        (64, 12, 12, 64, 64, False, False), (32, 16, 16, 128, 64, True, True), (8, 16, 16, 256, 128, False, False),
        (1, 8, 8, 128, 64, True, False), (2, 32, 8, 4096, 128, True, True), (4, 64, 8, 2048, 128, True, False),
        (2, 16, 1, 4096, 128, False, False),
    )
]  # fmt: skip
MODS = [Cell(name, 1, 16, 16, 8192, 8192, 128, False, mod=mod) for name in PASSES for mod in mods.NAMES]
CELLS = [*TABLE, *DECODE, *PAGED, *VARLEN, *SHORT_AND_GQA, *MODS]

# For a machine without an accelerator: nothing to be learnt about speed, only whether the program runs.
TINY = [
    *(Cell(name, 2, 4, 2, 32, 32, 16, True, is_quick=True) for name in PASSES),
    *(_varlen(name, (3, 0, 17, 12), 4, 2, 16, False, True) for name in PASSES),
    Cell("decode", 2, 4, 2, 1, 64, 16, False, is_quick=True),
    Cell("decode", 2, 4, 2, 1, 64, 16, False, is_quick=True, page_size=16),
    *(Cell(name, 1, 2, 2, 64, 64, 16, False, is_quick=True, mod=mod) for name in PASSES for mod in mods.NAMES),
]


class Inputs:
    """The tensors of a cell. `sets` holds several (k, v) for decoding, so that no cache of the device keeps them."""

    def __init__(self, cell: Cell, dtype: torch.dtype, device: str, cache_of_device: int):
        g = torch.Generator(device).manual_seed(1)

        def normal(*shape: int) -> torch.Tensor:
            x = torch.randn(shape, generator=g, device=device, dtype=dtype)
            return x.requires_grad_(cell.name == "backward")

        packed = (sum(cell.lengths),) if cell.lengths else None
        rows_q, rows_k = packed or (cell.batch, cell.seqlen_q), packed or (cell.batch, cell.seqlen)
        self.q = normal(*rows_q, cell.nheads, cell.headdim)
        many = min(16, 1 + 3 * cache_of_device // cell.cache_bytes) if cell.name == "decode" else 1
        self.sets = [tuple(normal(*rows_k, cell.nheads_k, cell.headdim) for _ in "kv") for _ in range(many)]
        self.k, self.v = self.sets[0]
        self.dout = torch.randn(self.q.shape, generator=g, device=device, dtype=dtype)
        self.cu_seqlens = self.used = self.pages = None
        if cell.lengths:
            self.cu_seqlens = torch.tensor([0, *accumulate(cell.lengths)], dtype=torch.int32, device=device)
        if cell.name == "decode":
            self.used = torch.full((cell.batch,), cell.seqlen, dtype=torch.int32, device=device)
        if cell.page_size:  # the rows of a set are a pool, its pages in any order
            pages = torch.randperm(cell.batch * cell.seqlen // cell.page_size, generator=g, device=device)
            self.pages = pages.to(torch.int32).view(cell.batch, -1)
