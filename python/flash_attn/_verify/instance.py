"""The tensors of a case, on any device and in any dtype, from one draw of numbers; and calls of the core on them."""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor

from flash_attn import _run
from flash_attn._call import Dropout, NewKeys, Rotary, Run, Scores, Sequences
from flash_attn._verify.cases import Case

SEED = (1234, 56)  # of dropout: seed and offset


def starts(lengths) -> tuple[int, ...]:
    return (0, *accumulate(lengths))


def pages_of(case: Case) -> list[list[int]]:
    """(batch, max_blocks): pages in falling order, page 0 left over: nobody may rely on neighbours."""
    each = -(-case.seqlen_k // case.page_size)
    return [[each * (case.sequences - b) - t for t in range(each)] for b in range(case.sequences)]


def shapes(case: Case) -> dict[str, tuple[int, ...]]:
    """Of all tensors of floating numbers that the case has."""
    batch = case.sequences
    rows_q = (sum(case.lengths_q) + case.spare_rows,) if case.lengths_q else (batch, case.seqlen_q)
    if case.page_size:
        rows_k = (batch * -(-case.seqlen_k // case.page_size) + 1, case.page_size)
    elif case.lengths_k:
        rows_k = (sum(case.lengths_k) + case.spare_rows,)
    else:
        rows_k = (case.cache_batch or batch, case.seqlen_k)
    found = {
        "q": (*rows_q, case.nheads, case.headdim),
        "k": (*rows_k, case.nheads_k, case.headdim),
        "v": (*rows_k, case.nheads_k, case.dim_v),
        "out": (*rows_q, case.nheads, case.dim_v),
        "lse": (case.nheads, rows_q[0]) if case.lengths_q else (batch, case.nheads, case.seqlen_q),
    }
    if case.sink:
        found["sink"] = (case.nheads,)
    if case.bias:
        rows = max(case.lengths_q) if case.lengths_q else case.seqlen_q
        keys = max(case.lengths_k) if case.lengths_k else case.seqlen_k
        full = (batch, case.nheads, rows, keys)
        found["bias"] = {"full": full, "heads": (1, *full[1:]), "keys": (batch, 1, 1, keys)}[case.bias]
    if case.appends:
        rows_new = (sum(case.lengths_new),) if case.lengths_new else (batch, case.seqlen_new)
        found["new_k"], found["new_v"] = ((*rows_new, case.nheads_k, d) for d in (case.headdim, case.dim_v))
    return found


def draw(case: Case, dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
    """Normal numbers that dtype holds exactly, on the CPU."""
    g = torch.Generator().manual_seed(seed)
    values = {}
    for name, shape in shapes(case).items():
        values[{"out": "dout", "lse": "dlse"}.get(name, name)] = torch.randn(shape, generator=g, dtype=torch.float64)
    values = {name: x.to(torch.float32 if name == "dlse" else dtype) for name, x in values.items()}
    if case.alibi:
        slopes = 0.5 ** torch.arange(1, case.sequences * case.nheads + 1, dtype=torch.float32)
        values["alibi"] = slopes.view(-1, case.nheads) if case.alibi == 2 else slopes[: case.nheads].clone()
    if case.rotary_dim:
        pairs = case.rotary_dim // 2
        angle = torch.arange(case.seqlen_k + 8)[:, None] / 100.0 ** (torch.arange(pairs) / pairs)
        table = torch.float32 if case.rotary_fp32 else dtype
        values["cos"], values["sin"] = angle.cos().to(table), angle.sin().to(table)
    return values


class Instance:
    """A case's tensors on a device. `results` holds what calls write: NaN until a call has written it."""

    def __init__(self, case: Case, values: dict[str, Tensor], dtype: torch.dtype, device: str):
        self.case, self.device = case, device
        wide = {"dlse": torch.float32, "alibi": torch.float32}
        if case.rotary_fp32:
            wide |= {"cos": torch.float32, "sin": torch.float32}
        self.values = {n: self._laid_out(x.to(device, wide.get(n, dtype), copy=True)) for n, x in values.items()}
        self.results: dict[str, Tensor] = {}
        shape = shapes(case)
        self._new = {
            "out": (shape["out"], dtype), "lse": (shape["lse"], torch.float32), "dq": (shape["q"], dtype),
            "dk": (shape["k"], dtype), "dv": (shape["v"], dtype), "dbias": (shape.get("bias"), torch.float32),
            "dsink": (shape.get("sink"), torch.float32),
        }  # fmt: skip

        def i32(numbers):
            return torch.tensor(numbers, dtype=torch.int32, device=device) if len(numbers) else None

        value = self.values.get
        self._sequences = Sequences(
            i32(starts(case.lengths_q)) if case.lengths_q else None,
            i32(starts(case.lengths_k)) if case.lengths_k else None,
            max(case.lengths_q, default=None), max(case.lengths_k, default=None), i32(case.seqused_q),
            i32(case.seqused_k), None if case.used_k < 0 else case.used_k, i32(case.leftpad_k),
            i32(case.cache_batch_idx), i32(pages_of(case)) if case.page_size else None,
        )  # fmt: skip
        self._scores = Scores(
            case.softmax_scale or None, case.causal, *case.window, case.softcap, value("alibi"), value("sink"),
            value("bias"), case.chunk,
        )  # fmt: skip
        self._dropout = Dropout(case.dropout, torch.tensor(SEED, device=device)) if case.dropout else None
        self._new_keys = self._rotary = None
        if case.appends:
            cu_new = i32(starts(case.lengths_new)) if case.lengths_new else None
            self._new_keys = NewKeys(value("new_k"), value("new_v"), cu_new)
        if case.rotary_dim:
            self._rotary = Rotary(value("cos"), value("sin"), case.interleaved, i32(case.rotary_positions))

    def _laid_out(self, x: Tensor) -> Tensor:
        if self.case.layout == "heads first" and x.dim() == 4:
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        if self.case.layout == "columns strided" and x.dim() >= 3:
            return torch.stack([x, x], -1)[..., 0]
        return x

    def _run(self, backend: str) -> Run:
        return Run(backend, None, self.case.deterministic, positive_empty_lse=self.case.positive_empty_lse)

    def _write(self, *names: str) -> list[Tensor | None]:
        for name in names:
            shape, dtype = self._new[name]
            if shape is not None:
                new = torch.full(shape, torch.nan, dtype=dtype, device=self.device)
                self.results[name] = new if name == "lse" else self._laid_out(new)
        return [self.results.get(name) for name in names]

    def forward(self, backend: str) -> dict[str, Tensor]:
        """-> what it wrote, by name: out, lse, and the caches where keys join them."""
        q, k, v = (self.values[n] for n in "qkv")
        out, lse = self._write("out", "lse")
        run = self._run(backend)
        groups = (self._sequences, self._scores, self._dropout, run, self._new_keys, self._rotary)
        _run.forward(q, k, v, out, lse, *groups, cache=self.case.appends)
        return {"out": out, "lse": lse} | ({"k_cache": k, "v_cache": v} if self.case.appends else {})

    def backward(self, backend: str) -> dict[str, Tensor]:
        """After forward: -> the gradients by name."""
        names = ["dq", "dk", "dv", *(["dbias"] if self.case.bias else ()), *(["dsink"] if self.case.sink else ())]
        self._write(*names)
        value, result = self.values.get, self.results.get
        run = self._run(backend)
        _run.backward(
            value("dout"), *(value(n) for n in "qkv"), result("out"), result("lse"), result("dq"), result("dk"),
            result("dv"), value("dlse") if self.case.dlse else None, result("dbias"), result("dsink"),
            self._sequences, self._scores, self._dropout, run,
        )  # fmt: skip
        return {n: self.results[n] for n in names}
