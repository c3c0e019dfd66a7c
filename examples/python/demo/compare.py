"""Exactness and speed against PyTorch: errors from one float64 computation, times taken turn by turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from flash_attn import flash_attn_func, flash_attn_varlen_func
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """`lengths` has one entry per sequence; packed sequences lie end to end, others have a batch dimension."""

    lengths: tuple[int, ...]
    nheads: int
    nheads_k: int
    headdim: int
    dtype: torch.dtype
    causal: bool = True
    packed: bool = False

    @property
    def name(self) -> str:
        heads = f"{self.nheads}" if self.nheads == self.nheads_k else f"{self.nheads}/{self.nheads_k}"
        length = f"{min(self.lengths)}-{max(self.lengths)}" if self.packed else f"{self.lengths[0]}"
        dtype = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[self.dtype]
        mask = "causal" if self.causal else "full"
        return f"{len(self.lengths)} x {length}, h{heads}, d{self.headdim}, {mask}, {dtype}"


@dataclass(frozen=True)
class Result:
    case: Case
    error: float  # the largest, ours
    error_sdpa: float
    seconds: float  # the least
    seconds_sdpa: float

    @property
    def speedup(self) -> float:
        return self.seconds_sdpa / self.seconds

    @property
    def exact(self) -> bool:
        """No more than twice the error of PyTorch's own arithmetic in this dtype, as the original judges itself."""
        return self.error <= 2 * self.error_sdpa


CASES = [
    Case((2048,), 16, 16, 64, torch.float32),
    Case((2048,), 16, 16, 64, torch.bfloat16),
    Case((4096,), 8, 8, 128, torch.float32, causal=False),
    Case((4096,), 8, 8, 128, torch.bfloat16),
    Case((1024, 1024), 32, 8, 128, torch.float32),
    Case((1024, 1024), 32, 8, 128, torch.float16),
    Case((17, 1500, 260, 900, 64, 700, 333), 16, 16, 64, torch.float32, packed=True),
]
QUICK_CASES = [
    Case((256,), 4, 4, 64, torch.float32),
    Case((192, 192), 8, 2, 64, torch.bfloat16),
    Case((17, 100, 1, 60), 4, 4, 32, torch.float32, packed=True),
]


def run(cases: list[Case], seconds: float, device: str) -> Iterator[Result]:
    """Each case in turn, timed for about `seconds`."""
    for index, case in enumerate(cases):
        generator = torch.Generator().manual_seed(index)
        total = sum(case.lengths)
        shapes = [(total, heads, case.headdim) for heads in (case.nheads, case.nheads_k, case.nheads_k)]
        q, k, v = (torch.randn(shape, generator=generator).to(device, case.dtype) for shape in shapes)
        ours, theirs = flash_call(case, q, k, v), sdpa_call(case, q, k, v)
        exact = in_float64(case, q, k, v)
        errors = [(out().reshape(exact.shape).double() - exact).abs().max().item() for out in (ours, theirs)]
        yield Result(case, *errors, *alternate(ours, theirs, seconds=seconds, device=device))


def flash_call(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
    if case.packed:
        cu_seqlens = torch.tensor([0, *case.lengths]).cumsum(0).to(q.device, torch.int32)
        longest = max(case.lengths)
        return lambda: flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, longest, longest, causal=case.causal)
    q, k, v = (x.unflatten(0, (len(case.lengths), -1)) for x in (q, k, v))
    return lambda: flash_attn_func(q, k, v, causal=case.causal)


def sdpa_call(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
    """Packed sequences are one call each, with nothing else in between: this function of PyTorch has no packed form."""
    if case.packed:
        parts = [x.split(case.lengths) for x in (q, k, v)]
    else:
        parts = [[x.unflatten(0, (len(case.lengths), -1))] for x in (q, k, v)]
    calls = [tuple(heads_first(x) for x in part) for part in zip(*parts, strict=True)]
    grouped = case.nheads != case.nheads_k

    def call() -> Tensor:
        outs = [
            F.scaled_dot_product_attention(*qkv, is_causal=case.causal, enable_gqa=grouped).transpose(1, 2)
            for qkv in calls
        ]
        return outs[0] if len(outs) == 1 else torch.cat([out[0] for out in outs])

    return call


def heads_first(x: Tensor) -> Tensor:
    """(seqlen, nheads, headdim) or (batch, seqlen, nheads, headdim) -> (batch, nheads, seqlen, headdim), a view."""
    return (x if x.ndim == 4 else x[None]).transpose(1, 2)


def in_float64(case: Case, q: Tensor, k: Tensor, v: Tensor, rows: int = 512) -> Tensor:
    """softmax(q k^T / sqrt(headdim)) v by the formula, in float64: (total, nheads, headdim)."""
    out = torch.empty(q.shape, dtype=torch.float64, device=q.device)
    group = case.nheads // case.nheads_k
    begin = 0
    for length in case.lengths:
        for head in range(case.nheads):
            keys = k[begin : begin + length, head // group].double()
            values = v[begin : begin + length, head // group].double()
            for row in range(0, length, rows):
                last = min(row + rows, length)
                seen = last if case.causal else length
                scores = q[begin + row : begin + last, head].double() @ keys[:seen].T / case.headdim**0.5
                if case.causal:
                    hidden = torch.ones(last - row, seen, dtype=torch.bool, device=q.device).triu(row + 1)
                    scores = scores.masked_fill(hidden, float("-inf"))
                out[begin + row : begin + last, head] = scores.softmax(-1) @ values[:seen]
        begin += length
    return out


def waiter(device: str) -> Callable[[], None]:
    """Waits until the device has done what it was told to."""
    return (lambda: None) if device == "cpu" else getattr(torch, torch.device(device).type).synchronize


def alternate(*calls: Callable[[], object], seconds: float, device: str, rounds: int = 3) -> list[float]:
    """The least time of each call, taken in turns, so that whatever else the machine does meets them alike."""
    wait = waiter(device)
    for call in calls:
        call()
    wait()
    least = [float("inf")] * len(calls)
    end = time.perf_counter() + seconds
    done = 0
    while done < rounds or time.perf_counter() < end:
        for index, call in enumerate(calls):
            begin = time.perf_counter()
            call()
            wait()
            least[index] = min(least[index], time.perf_counter() - begin)
        done += 1
    return least
