"""Is this FlagGems right, here, for calls like this one? Small inputs, against the `torch` engine.

A call is known by its `Signature`: all that decides which code of FlagGems runs, lengths apart. The lengths tried lie
on both sides of its tiles (16 to 128 rows, 32 or 64 keys), and so do the numbers of heads: with few it takes its
smallest tile, with many its largest.

Scores are fp32 sums of exact products in both, so lse agrees to 1e-3 by far, while one key of 260 too many or too few
moves lse by 4e-3 on average, in one row of thousands by much more. FlagGems rounds probabilities to 16 bits, and both
round out: each by at most eps / 2 of the largest value, 1.5 eps together.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flash_attn import _C
from flash_attn._call import Run, Scores, Sequences
from flash_attn._engines import Tensors
from flash_attn._engines.flaggems import adapter

_WINDOWS = {"none": (-1, -1), "causal": (-1, 0), "window": (17, 5), "left window": (17, -1), "right window": (-1, 5)}
_HEADS_K = (2, 32)
_LSE_TOLERANCE = 1e-3


class Signature(NamedTuple):
    dtype: str
    headdim: int
    group: int
    packed_q: bool
    one_query: bool
    keys: str  # "fixed", "packed", "pages", or "cache": fixed, of which some are in use
    page_size: int
    mask: str  # of _WINDOWS
    softcap: bool
    alibi: bool
    lse: bool
    blind: bool  # some rows may see nothing

    def __str__(self) -> str:
        words = [w for w in ("one_query", "softcap", "alibi", "lse", "blind") if getattr(self, w)]
        words += [self.mask] if self.mask != "none" else []
        words += ["packed queries"] if self.packed_q else []
        words.append(f"pages of {self.page_size}" if self.page_size else f"{self.keys} keys")
        return f"{', '.join(words).replace('_', ' ')} ({self.dtype}, headdim {self.headdim}, group {self.group})"


def signature_of(p) -> Signature:
    left, right = adapter.sides(p)
    if right == 0 and left < 0:
        mask = "causal"
    elif left >= 0 and right >= 0:
        mask = "window"
    else:
        mask = "left window" if left >= 0 else "right window" if right >= 0 else "none"
    if p.page_size:
        keys = "pages"
    else:
        keys = "packed" if p.uses("packed_k") else "cache" if p.uses("seqused_k") else "fixed"
    return Signature(
        dtype=p.dtype, headdim=p.headdim, group=p.group, packed_q=p.uses("packed_q"), one_query=p.max_seqlen_q == 1,
        keys=keys, page_size=p.page_size, mask=mask, softcap=p.softcap > 0, alibi=p.uses("alibi"), lse=p.uses("lse"),
        blind=mask != "none" and p.uses("blind_rows"),
    )  # fmt: skip


def check(varlen, s: Signature, device: torch.device) -> str:
    """What is wrong with calls like this; empty if nothing is."""
    try:
        for nheads_k in _HEADS_K:
            for lengths_q, lengths_k in _lengths(s):
                if wrong := _compare(varlen, s, nheads_k, lengths_q, lengths_k, device):
                    return wrong
    except torch.cuda.OutOfMemoryError:  # says nothing about FlagGems: not to be remembered
        raise
    except Exception as e:  # whatever a compiler or a driver says
        return f"{type(e).__name__}: {(str(e).splitlines() or [''])[0]}"
    return ""


def _lengths(s: Signature) -> list[tuple[list[int], list[int]]]:
    """Calls, as the lengths of their sequences. Fixed lengths are one number."""
    if not s.packed_q and s.keys == "fixed":
        pairs = [(1, 70), (1, 260)] if s.one_query else [(150, 33), (129, 64)] if s.blind else [(64, 64), (129, 260)]
        return [([n] * 2, [m] * 2) for n, m in pairs]
    lengths_q, lengths_k = [150, 129, 33, 64, 150, 9], [33, 260, 150, 64, 65, 0]
    if s.one_query:
        lengths_q = [1] * 6
    elif not s.packed_q:
        lengths_q = [129] * 6
    if s.packed_q:
        lengths_q[4] = 0
    return [(lengths_q, lengths_k)]


def _compare(varlen, s: Signature, nheads_k: int, lengths_q: list[int], lengths_k: list[int], device) -> str:
    from flash_attn._engines.torch import TorchEngine

    dtype = getattr(torch, s.dtype)
    g = torch.Generator(device="cpu").manual_seed(1)

    def table(values):
        return torch.tensor(values, dtype=torch.int32, device=device)

    def starts(lengths):
        return table([sum(lengths[:b]) for b in range(len(lengths) + 1)])

    def random(*shape):
        return torch.randn(*shape, generator=g, device="cpu").to(device, dtype)

    batch, longest_k, cols = len(lengths_k), max(lengths_k), (nheads_k, s.headdim)
    fields = {"max_seqlen_q": max(lengths_q), "max_seqlen_k": longest_k}
    if s.packed_q:
        fields["cu_seqlens_q"] = starts(lengths_q)
        rows_q = (sum(lengths_q) + 3,)  # three rows of no sequence
    else:
        rows_q = (batch, lengths_q[0])
    if s.keys == "packed":
        fields["cu_seqlens_k"] = starts(lengths_k)
        rows_k = (sum(lengths_k) + 3,)
    elif s.keys == "pages":
        blocks = -(-longest_k // s.page_size)
        fields["block_table"] = (
            torch.randperm(batch * blocks, generator=g, device="cpu").view(batch, blocks).to(device, torch.int32)
        )
        rows_k = (batch * blocks, s.page_size)
    else:
        rows_k = (batch, longest_k)
    if s.keys in ("pages", "cache"):
        fields["seqused_k"] = table(lengths_k)
        if not s.packed_q:
            fields = {n: x for n, x in fields.items() if not n.startswith("max_")}
    nheads = nheads_k * s.group
    q, k, v = random(*rows_q, nheads, s.headdim), random(*rows_k, *cols), random(*rows_k, *cols)
    left, right = _WINDOWS[s.mask]
    slopes = torch.rand(batch, nheads, generator=g, device="cpu").to(device) / 4 if s.alibi else None
    scores = Scores(1.3 * s.headdim**-0.5, False, left, right, 2.0 if s.softcap else 0.0, slopes)
    sequences = Sequences(**fields)

    results = []
    for forward in (lambda p, t: adapter.forward(varlen, p, t), TorchEngine().forward):
        out = torch.full_like(q, torch.nan)
        lse_shape = (nheads, *rows_q) if s.packed_q else (batch, nheads, rows_q[1])
        lse = torch.full(lse_shape, torch.nan, dtype=torch.float32, device=device) if s.lse else None
        # By name, as `torch` serves everything: the Problem is the same.
        run = Run(backend="torch", positive_empty_lse=False)
        _, p = _C.forward(q, k, v, out, lse, sequences, scores, None, run, None, None, None, False)
        with torch.inference_mode():
            forward(p, Tensors(q, k, v, out, lse, sequences, scores, None))
        results.append((out, lse))
    (out, lse), (true_out, true_lse) = results
    tolerance = 2 * torch.finfo(dtype).eps * float(v.float().abs().max())
    if not (error := _error(out, true_out)) <= tolerance:
        return f"out is off by {error:.2g} ({tolerance:.2g} is rounding)"
    if s.lse and not (error := _error(lse, true_lse)) <= _LSE_TOLERANCE:
        return f"lse is off by {error:.2g} ({_LSE_TOLERANCE:.2g} is rounding)"
    return ""


def _error(x: Tensor, y: Tensor) -> float:
    """The largest difference; NaN if there is one. Equal infinities differ by 0."""
    return float(torch.where(x == y, 0.0, (x.float() - y.float()).abs()).max())
