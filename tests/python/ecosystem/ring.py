"""ring-flash-attention over several processes, each with its part of the sequences, against the formula in float64.

    torchrun --nproc-per-node 2 tests/python/ecosystem/ring.py --backend gloo    # on the CPU
    torchrun --nproc-per-node 2 tests/python/ecosystem/ring.py --backend nccl    # a GPU per process

Rank 0 prints a line per case, and writes them to --json FILE; the exit status says whether all are as exact as they
should be. The package is as it comes from PyPI: it finds our functions under upstream's names.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))
import flash_attn
from support import formula
from support.compare import error, largest

BATCH, SEQLEN, NHEADS, NHEADS_K, HEADDIM = 2, 96, 4, 2, 32
LENGTHS = (48, 8, 16, 24)  # of packed sequences; each is divided by twice the number of processes


class Case(NamedTuple):
    function: str
    layout: str  # which rows a process holds
    causal: bool
    dtype: torch.dtype = torch.bfloat16
    packed: str = ""  # "kvpacked", "qkvpacked"
    heads_k_stride: int | None = None


# The package adds up gradients in place in what `.to(torch.float32)` gives, which for fp32 is its own buffer: it is
# right in 16 bits only. Its ring_flash_attn_func gives dq in bf16, whatever comes in.
CASES = {
    "ring": Case("ring_flash_attn_func", "chunks", False),
    "ring-causal": Case("ring_flash_attn_func", "chunks", True),
    "ring-kvpacked": Case("ring_flash_attn_kvpacked_func", "chunks", True, packed="kvpacked"),
    "ring-qkvpacked": Case("ring_flash_attn_qkvpacked_func", "chunks", True, packed="qkvpacked"),
    "zigzag": Case("zigzag_ring_flash_attn_func", "zigzag", True),
    "zigzag-fp16": Case("zigzag_ring_flash_attn_func", "zigzag", True, torch.float16),
    "stripe": Case("stripe_flash_attn_func", "stripes", True),
    "stripe-fp16": Case("stripe_flash_attn_func", "stripes", True, torch.float16),
    "ring-varlen": Case("ring_flash_attn_varlen_func", "chunks-varlen", False),
    "ring-varlen-causal": Case("ring_flash_attn_varlen_func", "chunks-varlen", True),
    "zigzag-varlen": Case("zigzag_ring_flash_attn_varlen_func", "zigzag-varlen", True),
    "llama3": Case("llama3_flash_attn_varlen_func", "flat", False, heads_k_stride=1),
    "llama3-causal": Case("llama3_flash_attn_varlen_func", "flat", True, heads_k_stride=1),
    "llama3-all-heads": Case("llama3_flash_attn_varlen_func", "flat", True, torch.float16, heads_k_stride=NHEADS_K),
}


def import_package():
    """ring_flash_attn 0.1.8 imports a name that transformers 5 has elsewhere. -> the module."""
    import transformers

    place = transformers.modeling_flash_attention_utils
    if not hasattr(place, "is_flash_attn_greater_or_equal_2_10"):
        place.is_flash_attn_greater_or_equal_2_10 = transformers.utils.is_flash_attn_greater_or_equal_2_10
    import ring_flash_attn

    return ring_flash_attn


def rows_of(layout: str, rank: int, world: int) -> torch.Tensor:
    """The rows that a process holds, in its order."""
    kind, _, varlen = layout.partition("-")
    if kind == "flat":
        return torch.arange(sum(LENGTHS)).chunk(world)[rank]
    parts, start = [], 0
    for length in LENGTHS if varlen else (SEQLEN,):
        rows = torch.arange(start, start + length)
        start += length
        if kind == "stripes":
            parts.append(rows[rank::world])
        elif kind == "chunks":
            parts.append(rows.chunk(world)[rank])
        else:
            halves = rows.chunk(2 * world)
            parts += [halves[rank], halves[2 * world - 1 - rank]]
    return torch.cat(parts)


def starts() -> torch.Tensor:
    return torch.tensor([0, *LENGTHS], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def varlen(case: Case) -> bool:
    return case.layout == "flat" or case.layout.endswith("varlen")


def tensors(case: Case) -> list[torch.Tensor]:
    """-> q, k, v, dout as every process sees them as a whole, on the CPU."""
    shape = (sum(LENGTHS),) if varlen(case) else (BATCH, SEQLEN)
    heads = (NHEADS,) * 4 if case.packed == "qkvpacked" else (NHEADS, NHEADS_K, NHEADS_K, NHEADS)
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(*shape, h, HEADDIM, generator=generator).to(case.dtype) for h in heads]


def formula_of(case: Case, q, k, v, dout, dtype) -> dict[str, torch.Tensor]:
    """The whole, by plain arithmetic in dtype; softmax_lse in fp32 at least."""
    inputs = [x.to(dtype).requires_grad_() for x in (q, k, v)]
    if varlen(case):
        out, lse = formula.attention_varlen(*inputs, starts(), starts(), dtype, causal=case.causal)
    else:
        out, lse = formula.attention(*inputs, dtype, causal=case.causal)
    gradients = torch.autograd.grad(out, inputs, dout.to(dtype))
    if dtype.itemsize == 2:
        lse = formula_of(case, q, k, v, dout, torch.float32)["softmax_lse"]
    return dict(zip(("out", "softmax_lse", "dq", "dk", "dv"), (out.detach(), lse.detach(), *gradients), strict=True))


def ring_of(module, case: Case, q, k, v, dout, device) -> dict[str, torch.Tensor]:
    """This process's part, by the ring."""
    rank, world = dist.get_rank(), dist.get_world_size()
    rows, dim = rows_of(case.layout, rank, world), 0 if varlen(case) else 1
    q, k, v, dout = (x.index_select(dim, rows).to(device) for x in (q, k, v, dout))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    parts = leaves
    if case.packed:
        parts = (q, torch.stack((k, v), dim + 1)) if case.packed == "kvpacked" else (torch.stack(leaves, dim + 1),)
    arguments = {}
    if case.layout == "flat":
        names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "local_k_slice")
        prepared = module.llama3_flash_attn_prepare_cu_seqlens(starts().to(device), case.causal, rank, world)
        arguments = dict(zip(names, prepared, strict=True), heads_k_stride=case.heads_k_stride)
    elif varlen(case):
        arguments = dict(cu_seqlens=starts().to(device) // world, max_seqlen=max(LENGTHS) // world)
    function = getattr(module, case.function)
    out, lse, _ = function(*parts, causal=case.causal, return_attn_probs=True, **arguments)
    gradients = torch.autograd.grad(out, leaves, dout)
    return dict(zip(("out", "softmax_lse", "dq", "dk", "dv"), (out.detach(), lse.detach(), *gradients), strict=True))


def check(module, name: str, device) -> dict:
    """-> {"case": name, tensor: [error, allowed]} of this process's part.

    Partial results are rounded to 16 bits once per process, and their sum again: that much is allowed beside what the
    plain arithmetic in that dtype errs by, in one process.
    """
    case = CASES[name]
    whole = tensors(case)
    exact, plain = (formula_of(case, *whole, dtype) for dtype in (torch.float64, case.dtype))
    rows = rows_of(case.layout, dist.get_rank(), dist.get_world_size())
    record = {"case": name}
    for what, got in ring_of(module, case, *whole, device).items():
        dim = exact[what].dim() - 1 if what == "softmax_lse" else 0 if varlen(case) else 1
        mine, theirs = (x[what].index_select(dim, rows) for x in (exact, plain))
        half_unit = torch.finfo(got.dtype).eps / 2
        roundings = dist.get_world_size() + 1
        allowed = error(theirs, mine) + roundings * half_unit * (largest(mine) + (what == "softmax_lse"))
        record[what] = [error(got.cpu(), mine), allowed]
    return record


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=("gloo", "nccl"), default="gloo")
    parser.add_argument("--json", type=Path, help="file for the records of all processes")
    options = parser.parse_args()
    device = torch.device("cpu")
    if options.backend == "nccl":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    module = import_package()
    dist.init_process_group(options.backend)
    wrong, records = 0, []
    for name in CASES:
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, check(module, name, device))
        records += [dict(record, rank=rank) for rank, record in enumerate(everyone)]
        for record in records[-len(everyone) :]:
            errors = {what: x for what, x in record.items() if isinstance(x, list)}
            wrong += any(not got <= allowed for got, allowed in errors.values())
            if dist.get_rank() == 0:
                said = "  ".join(f"{what} {got:.1e} of {allowed:.1e}" for what, (got, allowed) in errors.items())
                print(f"{name:20s} rank {record['rank']}  {said}", flush=True)
    if dist.get_rank() == 0 and options.json:
        options.json.write_text(json.dumps(records), encoding="utf-8")
    if dist.get_rank() == 0:
        print(f"{len(CASES)} cases, {dist.get_world_size()} processes, {device.type}, {flash_attn.__plus_version__}")
    dist.destroy_process_group()
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
