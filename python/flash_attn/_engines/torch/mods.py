"""What a caller makes of scores and masks: score_mod and mask_mod, functions of numbers, and lists of blocks.

A function sees one score at a time, as numbers without dimensions: FlexAttention's convention. It is evaluated for a
block of them (b: C, h: H, q_idx: R, kv_idx: N), by torch.vmap or by broadcasting, so memory stays that of the block.
Positions count from the start of their sequence. Those that a sequence lacks are asked as its last one: no index that
the function makes of them leads outside a table that has a row for every position.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from flash_attn._engines.torch.pointwise import is_pointwise
from flash_attn._engines.torch.sequences import Lengths, positions
from flash_attn._errors import InvalidType


class Tables(NamedTuple):
    """Of all sequences, int64 (batch)."""

    seqlen_q: Tensor
    seqlen_k: Tensor
    offset_q: Tensor  # of the first row among packed ones; 0 where sequences are entries of a batch
    offset_k: Tensor


class SeqlenInfo:
    """Those numbers of the sequence `b`, without dimensions; looked up when asked for, as most functions never do."""

    def __init__(self, b: Tensor, tables: Tables):
        self._b, self._tables = b, tables

    def _of(name: str):
        return property(lambda self: torch.ops.aten.index(getattr(self._tables, name), [self._b]))

    seqlen_q, seqlen_k, offset_q, offset_k = map(_of, Tables._fields)


@dataclass
class BlockLists:
    """Which blocks of scores count. What no list names is not computed."""

    SKIPPED, PARTIAL, FULL = 0, 1, 2  # partial: where mask_mod says so; full: every score

    kinds: Tensor  # uint8 (batch | 1, nheads | 1, blocks of rows, blocks of keys), on the CPU
    size: tuple[int, int]  # rows and keys of a block
    made: dict = field(default_factory=dict, init=False, compare=False)  # what an engine keeps of them


@dataclass
class Mods:
    """`score_mod(score, b, h, q_idx, kv_idx, info) -> score`, `mask_mod(b, h, q_idx, kv_idx, info) -> bool`.

    `score_mod_bwd(dscore, score, b, ..., info) -> dscore` is the gradient, if not autograd's. `reads`: tensors that
    score_mod reads and that count in the dtype of sums: those of 16 bits, and those that want a gradient. A backward
    adds gradients to `dreads`, None where nobody wants one.
    """

    backend: ClassVar[str] = "torch"

    score_mod: Callable | None = None
    mask_mod: Callable | None = None
    score_mod_bwd: Callable | None = None
    reads: tuple[Tensor, ...] = ()
    dreads: tuple[Tensor | None, ...] = ()
    blocks: BlockLists | None = None
    first_head: int = 0  # of the caller's, where a call computes some of them


VALUES = {"score_mod": 1, "mask_mod": 0, "score_mod_bwd": 2}  # that a function takes before b, h, q_idx, kv_idx


class OfNumbers(TorchFunctionMode):
    """table[q_idx] looks a number up, where Python's indexing would ask a tensor without dimensions for its value.

    `instead`: by the id of a tensor, one that takes its place."""

    def __init__(self, instead: dict[int, Tensor]):
        super().__init__()
        self.instead = instead

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if self.instead:
            args, kwargs = pytree.tree_map(lambda x: self.instead.get(id(x), x), (args, kwargs))
        if function is Tensor.__getitem__:
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            leaves = pytree.tree_leaves(index)
            if all(type(x) is int or (isinstance(x, Tensor) and x.dtype != torch.bool) for x in leaves):
                index = [torch.tensor(x, device=args[0].device) if type(x) is int else x for x in leaves]
                return torch.ops.aten.index(args[0], index)
        return function(*args, **(kwargs or {}))


def _not_a_number(x, name: str) -> InvalidType:
    got = f"a tensor of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
    return InvalidType(f"{name}: expected to return one number for one score, got {got}")


def _checked(x, dtype, like: Tensor, name: str) -> Tensor:
    """What a function returns, as a tensor of `dtype`."""
    if isinstance(x, (bool, int, float)):
        x = torch.tensor(x, device=like.device)
    if not isinstance(x, Tensor):
        raise _not_a_number(x, name)
    if (dtype == torch.bool) != (x.dtype == torch.bool):
        expected = "a bool" if dtype == torch.bool else "a score"
        raise InvalidType(f"{name}: expected to return {expected}, got {str(x.dtype)[6:]}")
    return x.to(dtype)


@dataclass(frozen=True)
class Evaluation:
    """function(*values, b, h, q_idx, kv_idx, SeqlenInfo), number by number, with results in `dtype`."""

    function: Callable
    name: str
    dtype: torch.dtype
    info: Tables
    instead: dict[int, Tensor] = field(default_factory=dict)  # by the id of a tensor that it reads, one in its place
    broadcasts: bool = False

    def _of(self, *x):
        values, (b, h, q_idx, kv_idx) = x[:-4], x[-4:]
        with OfNumbers(self.instead):
            return self.function(*values, b, h, q_idx, kv_idx, SeqlenInfo(b, self.info))

    def fastest(self, values: int) -> Evaluation:
        """The same, called with tensors that broadcast if its operations allow that. `values`: how many it takes."""
        device = self.info.seqlen_q.device
        shapes = [(2, 2, 2, 2)] * values + [(2, 1, 1, 1), (1, 2, 1, 1), (1, 1, 2, 1), (1, 1, 1, 2)]
        dtypes = [torch.float32] * values + [torch.int64] * 4
        with torch.no_grad():
            x = tuple(torch.zeros(s, dtype=d, device=device) for s, d in zip(shapes, dtypes, strict=True))
            return replace(self, broadcasts=is_pointwise(self._of, x))

    def __call__(self, values: tuple[Tensor, ...], where: tuple[Tensor, ...]) -> Tensor:
        """
        values  of shape (C, H, R, N)
        where   b (C), h (H), q_idx (R), kv_idx (N): int64; (C, R) and (C, N) where sequences have their own
        -> (C, H, R, N), or of a shape that broadcasts to it
        """
        b, h, q_idx, kv_idx = where
        if self.broadcasts:
            q_idx, kv_idx = (x if x.dim() == 2 else x[None] for x in (q_idx, kv_idx))
            x = self._of(
                *values, b[:, None, None, None], h[:, None, None], q_idx[:, None, :, None], kv_idx[:, None, None]
            )
            x = _checked(x, self.dtype, b, self.name)
            return x[(None,) * (4 - x.dim())]

        def of_numbers(*x):
            x = _checked(self._of(*x), self.dtype, b, self.name)
            if x.dim():
                raise _not_a_number(x, self.name)
            return x

        every = (0,) * len(values)
        own = [0 if x.dim() == 2 else None for x in (q_idx, kv_idx)]
        mapped = of_numbers
        for dims in ((None, None, None, 0), (None, None, 0, None), (None, 0, None, None), (0, None, *own)):
            mapped = torch.vmap(mapped, in_dims=(*every, *dims))
        # Copies, as the function may write to its arguments.
        return mapped(*(x.clone() for x in (*values, *where)))


class Modifier:
    """The functions of a call, for blocks of it."""

    def __init__(self, mods: Mods, p, sequences, device: torch.device):
        self.mods, self.device = mods, device
        self._broadcasts: dict[str, bool] = {}
        wide = torch.float64 if p.dtype == "float64" else torch.float32
        self.reads = [x.detach().to(torch.promote_types(x.dtype, wide)) for x in mods.reads]
        self.heads = torch.arange(mods.first_head, mods.first_head + p.nheads, device=device)
        self.lengths: tuple[Lengths, Lengths] = (sequences.q.length, sequences.k.length)

        def table(x: Lengths, most: int | None = None) -> Tensor:
            x = x if isinstance(x, Tensor) else torch.full((p.batch,), x, device=device)
            return x if most is None else x.clamp(0, most)

        q, k = sequences.q, sequences.k
        packed_k = k.table is None and k.entry is not None  # a sequence of pages starts at 0
        starts = (table(q.start, max(0, q.rows - 1)), table(k.start if packed_k else 0, max(0, k.rows - 1)))
        self.info = Tables(*(table(x) for x in self.lengths), *starts)

    def _positions(self, r: slice, b: slice, length: Lengths) -> Tensor:
        """(n), or (C, n) where sequences have lengths of their own."""
        r = positions(r, self.device)
        if isinstance(length, Tensor):
            return torch.minimum(r[None], (length[b, None] - 1).clamp(min=0))
        return r.clamp(max=max(0, length - 1))

    def _where(self, b: slice, i: slice, j: slice) -> tuple[Tensor, ...]:
        q_idx, kv_idx = (self._positions(r, b, n) for r, n in zip((i, j), self.lengths, strict=True))
        return positions(b, self.device), self.heads, q_idx, kv_idx

    def _evaluation(self, name: str, dtype, info=None, instead=None) -> Evaluation:
        """Of the function called `name`; how it is called best is found out once."""
        if name not in self._broadcasts:
            new = Evaluation(getattr(self.mods, name), name, dtype, self.info, self._instead(self.reads))
            self._broadcasts[name] = new.fastest(VALUES[name]).broadcasts
        instead = self._instead(self.reads) if instead is None else instead
        info = self.info if info is None else info
        return Evaluation(getattr(self.mods, name), name, dtype, info, instead, self._broadcasts[name])

    def _instead(self, reads) -> dict[int, Tensor]:
        return {id(x): y for x, y in zip(self.mods.reads, reads, strict=True)}

    def allowed(self, b: slice, i: slice, j: slice) -> Tensor:
        """What mask_mod says, bool (C or 1, H or 1, R, N)."""
        allowed = self._evaluation("mask_mod", torch.bool)((), self._where(b, i, j))
        return allowed.expand(-1, -1, i.stop - i.start, j.stop - j.start)

    def score(self, u: Tensor, b: slice, i: slice, j: slice, gradient: bool) -> tuple[Tensor, Callable | None]:
        """Scores u (C, H, R, N) -> those that score_mod makes of them, and ds -> du (which adds to dreads)."""
        mods, where = self.mods, self._where(b, i, j)
        evaluation = self._evaluation("score_mod", u.dtype)
        if not gradient or mods.score_mod_bwd is not None:

            def pull_by_hand(ds: Tensor) -> Tensor:
                return self._evaluation("score_mod_bwd", u.dtype)((ds, u), where).expand_as(u)

            return evaluation((u,), where).expand_as(u), pull_by_hand
        with torch.inference_mode(False), torch.enable_grad():
            leaf = u.clone().requires_grad_()  # clones may be saved by autograd; what inference mode made may not
            where, info, reads = ([x.clone() for x in of] for of in (where, self.info, self.reads))
            wanted = [(x, total) for x, total in zip(reads, mods.dreads, strict=True) if total is not None]
            for x, _ in wanted:
                x.requires_grad_()
            evaluation = self._evaluation("score_mod", u.dtype, Tables(*info), self._instead(reads))
            s = evaluation((leaf,), where).expand_as(leaf)

        def pull(ds: Tensor) -> Tensor:
            if not s.requires_grad:
                return torch.zeros_like(ds)
            with torch.inference_mode(False):
                du, *more = torch.autograd.grad(s, (leaf, *(x for x, _ in wanted)), ds.clone(), allow_unused=True)
            for (_, total), x in zip(wanted, more, strict=True):
                if x is not None:
                    total += x
            return torch.zeros_like(ds) if du is None else du

        return s.detach(), pull


def tensors_read(name: str, function: Callable, device: torch.device) -> tuple[Tensor, ...]:
    """The tensors that a call of the function reads, however it comes by them. `name`: what it is, of VALUES."""
    made, found = {}, {}

    class Watch(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            for x in pytree.tree_leaves((args, kwargs)):
                if isinstance(x, Tensor) and id(x) not in made:
                    found[id(x)] = x
            results = function(*args, **(kwargs or {}))
            made.update((id(x), x) for x in pytree.tree_leaves(results))  # alive: no other tensor gets their ids
            return results

    zero = torch.zeros((1,), dtype=torch.int64, device=device)
    tables = Tables(*(zero.clone() for _ in Tables._fields))
    made.update((id(x), x) for x in tables)
    dtype = torch.bool if name == "mask_mod" else torch.float32

    def one(*numbers):
        made.update((id(x), x) for x in numbers)
        with Watch():
            return _checked(function(*numbers, SeqlenInfo(numbers[-4], tables)), dtype, numbers[-4], name)

    with OfNumbers({}):
        values = [torch.zeros((1,), device=device) for _ in range(VALUES[name])]
        torch.vmap(one)(*values, *(zero.clone() for _ in range(4)))
    return tuple(found.values())
