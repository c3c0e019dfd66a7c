"""A caller's function of one score, as the source of a Triton function: seen as the dispatcher sees it, in one call.

The function is called once with numbers on the CPU, of shapes that broadcast, and tables that stand for its own. Each
operation on what depends on the numbers becomes a line, if it is one of the list below or a lookup in a table; what the
function computes besides is a constant. The gradient is autograd's, seen in the same way. The source decides what is
compiled: a function that is made anew for every call compiles nothing, if it says the same.
"""

from __future__ import annotations

import functools
import linecache
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from flash_attn._engines.torch.mods import OfNumbers, SeqlenInfo, Tables
from flash_attn._engines.triton.kernels.scores import tanh

MOST_TABLES, MOST_DIMENSIONS = 4, 4
MOST_FACTORS = 16  # that a power is written as
NUMBERS = {
    "score_mod": ("score", "b", "h", "i", "j"),
    "mask_mod": ("b", "h", "i", "j"),
    "score_mod_bwd": ("dscore", "score", "b", "h", "i", "j"),
}
_SHAPES = {"b": (2, 1, 1, 1), "h": (1, 2, 1, 1), "i": (1, 1, 2, 1), "j": (1, 1, 1, 2)}
_LENGTHS = ("seqlen_q", "seqlen_k", "offset_q", "offset_k")  # of Tables, in its order
_TABLE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.int32, torch.int64, torch.bool)


class Untraceable(Exception):
    """Why a function cannot be part of a kernel, in words."""


@triton.jit
def larger(a, b):
    """torch.maximum: NaN if one is."""
    return tl.where((a > b) | (a != a), a, b)


@triton.jit
def smaller(a, b):
    return tl.where((a < b) | (a != a), a, b)


@triton.jit
def sign(x):
    """-1, 0 or 1, in x's type; 0 of NaN, as PyTorch has it."""
    return (tl.where(x > 0, 1, 0) - tl.where(x < 0, 1, 0)).to(x.dtype)


@triton.jit
def look_up(table, at, size):
    """One index of a table: a negative one counts from the end, as in PyTorch; none leads outside."""
    at = tl.where(at < 0, at + size, at)
    return tl.minimum(tl.maximum(at, 0), size - 1)


@triton.jit
def whole_quotient(a, b, FLOOR: tl.constexpr):
    """a / b of fp32 as a whole number; by way of fp64, where a quotient rounds to no other whole number."""
    a = (a + tl.zeros((1,), tl.float32)).to(tl.float64)
    b = (b + tl.zeros((1,), tl.float32)).to(tl.float64)
    x = a / b
    x = tl.floor(x) if FLOOR else tl.where(x < 0, tl.ceil(x), tl.floor(x))
    return x.to(tl.float32)


@triton.jit
def remainder(a, b):
    """Of fp32, with b's sign, by way of fp64 too: a GPU's own comes of a quotient that is rounded."""
    a = (a + tl.zeros((1,), tl.float32)).to(tl.float64)
    b = (b + tl.zeros((1,), tl.float32)).to(tl.float64)
    return (a - tl.floor(a / b) * b).to(tl.float32)


@triton.jit
def quotient(a, b):
    """Rounded as PyTorch's, where Triton's own `/` of fp32 may be off by two units in the last place."""
    return tl.div_rn(a + tl.zeros((1,), tl.float32), b + tl.zeros((1,), tl.float32))


# Operations of ATen by name: as expressions of their arguments. f: computed in fp32; n: in the type of the result.
_FLOAT = {
    "exp": "tl.exp({})", "exp2": "tl.exp2({})", "log": "tl.log({})", "log2": "tl.log2({})", "sqrt": "tl.sqrt({})",
    "rsqrt": "(1.0 / tl.sqrt({}))", "reciprocal": "(1.0 / {})", "sin": "tl.sin({})", "cos": "tl.cos({})",
    "tanh": "tanh({}, True)", "sigmoid": "(1.0 / (1.0 + tl.exp(-{})))", "erf": "tl.erf({})",
    "floor": "tl.floor({})", "ceil": "tl.ceil({})",
    "tanh_backward": "({0} * (1.0 - {1} * {1}))", "sigmoid_backward": "({0} * (1.0 - {1}) * {1})",
}  # fmt: skip
_NUMBER = {
    "neg": "(-{})", "abs": "tl.abs({})", "mul": "({} * {})", "maximum": "larger({}, {})",
    "minimum": "smaller({}, {})", "relu": "larger({}, 0)", "alias": "{}", "detach": "{}", "clone": "{}",
    "_to_copy": "{}", "view": "{}", "expand": "{}",
}  # fmt: skip
_COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_LOGIC = {"bitwise_and": "&", "bitwise_or": "|", "bitwise_xor": "^"}
_BOOL_LOGIC = {"logical_and": "&", "logical_or": "|", "logical_xor": "^"}
_CONSTANT = {"zeros_like": 0.0, "ones_like": 1.0}


def _literal(x) -> str:
    if isinstance(x, bool):
        return str(x)
    if isinstance(x, float):
        return repr(x) if math.isfinite(x) else f'float("{x}")'
    if isinstance(x, int):
        if abs(x) >= 1 << 62:
            raise Untraceable(f"the number {x} is too large")
        return f"({x})" if abs(x) < 1 << 30 else f"tl.full((1,), {x}, tl.int64)"  # a sum of it may need 64 bits
    raise Untraceable(f"a constant {type(x).__name__}")


def _power(x: str, exponent: float) -> str:
    if not math.isfinite(exponent):
        raise Untraceable(f"a power of {exponent}")
    if exponent < 0:
        return f"(1.0 / {_power(x, -exponent)})"
    if exponent == 0.5:
        return f"tl.sqrt({x})"
    if exponent == int(exponent):  # of negative numbers as well
        if exponent > MOST_FACTORS:
            raise Untraceable(f"a power of {exponent:g}")
        return "(" + " * ".join([x] * int(exponent) or ["1.0"]) + ")"
    return f"tl.exp2({exponent!r} * tl.log2({x}))"


class _Recorder(TorchDispatchMode):
    """Lines of source, while the function runs."""

    def __init__(self, names: dict[int, tuple[Tensor, str]], tables: dict[int, tuple[Tensor, int]]):
        super().__init__()
        self.names = (
            names  # of what depends on the numbers, by id; the tensor beside it lives, and so the id is its own
        )
        self.tables = tables
        self.lines: list[str] = []
        self.derived: dict[int, Tensor] = {}  # made of tables without a lookup
        self.is_autograd = False  # which adds to sums of its own in place: the sum has a new name then

    def name_of(self, x, dtype: torch.dtype | None = None) -> str:
        """An argument as an expression; `dtype`: converted to it."""
        if isinstance(x, Tensor):
            if id(x) in self.names:
                text = self.names[id(x)][1]
            elif id(x) in self.tables and x.dim() == 0:
                text = self._number_of_table(x)
            elif id(x) in self.tables or id(x) in self.derived:
                raise Untraceable("it computes with a whole table; do that before the call")
            elif x.numel() == 1 and x.dim() == 0:
                return self.name_of(x.item(), dtype)
            else:
                raise Untraceable("it computes with a tensor that is no number")
            return text if dtype is None or x.dtype == dtype else self._converted(text, x.dtype, dtype)
        if isinstance(x, (bool, int, float)):
            if dtype is not None and dtype.is_floating_point:
                x = float(x)
            return _literal(x)
        raise Untraceable(f"it computes with {type(x).__name__}")

    def _number_of_table(self, x: Tensor) -> str:
        text = f"tl.load(tables[{self.tables[id(x)][1]}])"
        if x.dtype == torch.bool:
            return f"({text} != 0)"
        return f"{text}.to(tl.float32)" if x.dtype == torch.float32 else text

    def _converted(self, text: str, old: torch.dtype, new: torch.dtype) -> str:
        if new == torch.bool:
            return f"({text} != 0)"
        if new.is_floating_point:
            return f"({text}).to(tl.float32)"
        if old.is_floating_point:
            return f"({text}).to(tl.{'int64' if new == torch.int64 else 'int32'})"
        return f"({text}).to(tl.int32)" if old == torch.bool else text  # whole numbers have 32 bits unless they need 64

    def _lookup(self, table: Tensor, index) -> str:
        known = self.tables.get(id(table))
        if known is None:
            words = "a table that it has computed" if id(table) in self.derived else "a tensor that it has made"
            raise Untraceable(f"it looks numbers up in {words}; make it before the call")
        number = known[1]
        if isinstance(number, str):  # of SeqlenInfo
            return number
        if len(index) != table.dim() or any(x is None for x in index):
            raise Untraceable("it takes a part of a table with more than one number")
        offset = ""
        for d, x in enumerate(index):
            if x.dtype == torch.bool:
                raise Untraceable("it looks numbers up by a mask")
            at = f"look_up(tables[{number}], {self.name_of(x)}, sizes[{number}][{d}])"
            offset = f"({offset} * sizes[{number}][{d}] + {at})" if offset else f"({at}).to(tl.int64)"
        text = f"tl.load(tables[{number}] + {offset})"
        if table.dtype == torch.bool:
            return f"({text} != 0)"
        return f"{text}.to(tl.float32)" if table.dtype == torch.float32 else text

    def _expression(self, operation, args, kwargs, result: Tensor) -> str:
        name, dtype = operation._schema.name.removeprefix("aten::"), result.dtype
        name = name.removesuffix("_") if operation._schema.is_mutable else name
        if name == "index":
            return self._lookup(args[0], args[1])
        if dtype not in (torch.float32, torch.int64, torch.int32, torch.bool):
            raise Untraceable(f"{name} gives {str(dtype)[6:]}; float32 is the type of scores")
        if name in _COMPARISONS or name in _BOOL_LOGIC:
            common = torch.bool if name in _BOOL_LOGIC else torch.result_type(*args[:2])
            a, b = (self.name_of(x, common) for x in args[:2])
            return f"({a} {_COMPARISONS.get(name) or _BOOL_LOGIC[name]} {b})"
        if name in _LOGIC:
            a, b = (self.name_of(x, dtype) for x in args[:2])
            return f"({a} {_LOGIC[name]} {b})"
        if name in ("logical_not", "bitwise_not"):
            return f"({self.name_of(args[0], torch.bool if name == 'logical_not' else dtype)} == 0)" if (
                name == "logical_not" or dtype == torch.bool) else f"(~{self.name_of(args[0])})"  # fmt: skip
        if name in ("add", "sub", "rsub"):
            a, b = (self.name_of(x, dtype) for x in args[:2])
            alpha = kwargs.get("alpha", args[2] if len(args) > 2 else 1)
            if name == "rsub":
                a, b = b, a
            if dtype == torch.bool:
                return f"({a} | {b})"
            if alpha != 1:
                b = f"({b} * {self.name_of(alpha, dtype)})"
            return f"({a} {'+' if name == 'add' else '-'} {b})"
        if name == "where":
            if len(args) != 3:
                raise Untraceable("where with one argument")
            a, b = (self.name_of(x, dtype) for x in args[1:])
            return f"tl.where({self.name_of(args[0], torch.bool)}, {a}, {b})"
        if name == "masked_fill":
            x, value = (self.name_of(x, dtype) for x in (args[0], args[2]))
            return f"tl.where({self.name_of(args[1], torch.bool)}, {value}, {x})"
        if name == "div":
            return self._quotient(args, kwargs.get("rounding_mode"), dtype)
        if name == "floor_divide":
            return self._quotient(args, "floor", dtype)
        if name == "remainder":
            a, b = (self.name_of(x, dtype) for x in args[:2])
            if dtype.is_floating_point:
                return f"remainder({a}, {b})"
            return f"({a} - {self._quotient(args, 'floor', dtype)} * {b})"
        if name in ("clamp", "clamp_min", "clamp_max"):
            low, high = (args[1:] + (kwargs.get("min"), kwargs.get("max")))[:2] if name == "clamp" else (
                (args[1], None) if name == "clamp_min" else (None, args[1]))  # fmt: skip
            text = self.name_of(args[0], dtype)
            text = text if low is None else f"larger({text}, {self.name_of(low, dtype)})"
            return text if high is None else f"smaller({text}, {self.name_of(high, dtype)})"
        if name == "pow" and isinstance(args[1], (int, float)) and dtype == torch.float32:
            return _power(self.name_of(args[0], dtype), float(args[1]))
        if name == "pow" and isinstance(args[0], (int, float)) and args[0] > 0 and dtype == torch.float32:
            x = self.name_of(args[1], dtype)
            return f"tl.exp2({x})" if args[0] == 2 else f"tl.exp2({math.log2(args[0])!r} * {x})"
        if name == "sign" or name == "sgn":
            return f"sign({self.name_of(args[0], dtype)})"
        if name == "threshold_backward":
            return f"tl.where({self.name_of(args[1])} <= {self.name_of(args[2], dtype)}, 0.0, {self.name_of(args[0])})"
        if name in _CONSTANT or name == "full_like":
            value = args[1] if name == "full_like" else _CONSTANT[name]
            return self.name_of(value if dtype.is_floating_point else type(value)(value), dtype)
        if name == "mul" and not dtype.is_floating_point:  # a product of positions may need 64 bits
            a, b = (self.name_of(x, dtype) for x in args)
            return f"(({a} + tl.zeros((1,), tl.int64)) * {b})" if dtype != torch.bool else f"({a} & {b})"
        if name in _FLOAT and dtype == torch.float32:
            return _FLOAT[name].format(*(self.name_of(x, torch.float32) for x in args))
        if name in _NUMBER:
            shaped = {"view", "expand"}
            if name in shaped and tuple(result.shape) != tuple(args[0].shape):
                raise Untraceable(f"it calls {name}: each result is of one score")
            operands = args[:1] if name in shaped or _NUMBER[name].count("{}") == 1 else args
            converted = torch.float32 if dtype.is_floating_point else dtype
            return _NUMBER[name].format(*(self.name_of(x, converted) for x in operands))
        raise Untraceable(f"{name} is no operation that a kernel of ours has")

    def _quotient(self, args, rounding, dtype: torch.dtype) -> str:
        a, b = (self.name_of(x, dtype) for x in args[:2])
        if dtype.is_floating_point:
            if not rounding:
                return f"quotient({a}, {b})"
            return f"whole_quotient({a}, {b}, {rounding == 'floor'})"
        if rounding == "trunc":
            return f"({a} // {b})"  # Triton's own
        rest = f"((({a}) % ({b}) != 0) & ((({a}) < 0) != (({b}) < 0))).to(tl.int32)"
        return f"(({a}) // ({b}) - {rest})"

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        leaves = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        is_lookup = operation is torch.ops.aten.index.Tensor and id(args[0]) in self.tables
        if is_lookup and all(isinstance(x, Tensor) for x in args[1]) and len(args[1]) == args[0].dim():
            # Not done: the numbers that stand for positions may be none of the table's.
            shape = torch.broadcast_shapes(*(x.shape for x in args[1]))
            results = torch.zeros(shape, dtype=args[0].dtype, device="cpu")
        else:
            results = operation(*args, **kwargs)
        depends = is_lookup or any(id(x) in self.names for x in leaves)
        if not depends:
            if any(id(x) in self.tables or id(x) in self.derived for x in leaves):
                made = pytree.tree_leaves(results)
                if not all(isinstance(x, Tensor) for x in made):  # of a stand-in
                    raise Untraceable("it takes a number out of a tensor; do that before the call")
                self.derived.update((id(x), x) for x in made if isinstance(x, Tensor) and id(x) not in self.tables)
            return results
        if operation._schema.is_mutable and not self.is_autograd:
            raise Untraceable("it writes to a number")
        if not isinstance(results, Tensor):
            raise Untraceable(
                f"{operation._schema.name.removeprefix('aten::')} is no operation that a kernel of ours has"
            )
        if id(results) not in self.names or operation._schema.is_mutable:
            name = f"x{len(self.lines)}"
            self.lines.append(f"{name} = {self._expression(operation, args, kwargs, results)}")
            self.names[id(results)] = results, name
        return results


@dataclass(frozen=True)
class Traced:
    """A Triton function f(*numbers, lengths, tables, sizes) and the tables that it reads."""

    function: object
    tables: tuple[Tensor, ...]


_TO_PYTHON = (Tensor.tolist, Tensor.numpy, Tensor.__array__)  # which no dispatcher sees


class _StandIns(OfNumbers):
    """Puts a tensor of one number in the place of each table that the function reads, on the CPU, of its shape; what
    the function makes itself stays. 16 bits count in fp32."""

    def __init__(self, numbers, device: torch.device, first: int):
        super().__init__({})
        self.device, self.first = device, first
        self.made = {id(x): x for x in numbers}  # alive, so that ids stay theirs
        self.tables: list[Tensor] = []
        self.numbers_of: dict[int, tuple[Tensor, int | str]] = {}  # by the id of a stand-in: the table's number

    def _stand_in(self, x):
        if not isinstance(x, Tensor) or id(x) in self.made:
            return x
        if id(x) not in self.instead:
            _check_table(x, self.device)
            dtype = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
            y = torch.zeros((), dtype=dtype, device="cpu").expand(x.shape).detach()
            self.made[id(y)] = self.instead[id(x)] = y
            self.numbers_of[id(y)] = y, self.first + len(self.tables)
            self.tables.append(x)
            if self.first + len(self.tables) > MOST_TABLES:
                raise Untraceable(f"more than {MOST_TABLES} tables are read")
        return self.instead[id(x)]

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in _TO_PYTHON:
            raise Untraceable("it takes numbers out of a tensor; do that before the call")
        args, kwargs = pytree.tree_map(self._stand_in, (args, kwargs or {}))
        results = super().__torch_function__(function, types, args, kwargs)
        self.made.update((id(x), x) for x in pytree.tree_leaves(results) if isinstance(x, Tensor))
        return results


def _check_table(x: Tensor, device: torch.device) -> None:
    if x.dtype not in _TABLE_DTYPES:
        raise Untraceable(f"it reads a table of {str(x.dtype)[6:]}")
    if x.dim() > MOST_DIMENSIONS:
        raise Untraceable(f"it reads a table of {x.dim()} dimensions, {MOST_DIMENSIONS} are the most")
    if x.device != device and x.dim():
        raise Untraceable(f"it reads a table on {x.device}")
    if not x.numel():
        raise Untraceable("it reads an empty table")


def _result(x, dtype: torch.dtype, recorder: _Recorder) -> str:
    if isinstance(x, Tensor) and x.dim() and id(x) not in recorder.names:
        raise Untraceable("it returns a tensor that is no number")
    if isinstance(x, Tensor) and (x.dtype == torch.bool) != (dtype == torch.bool):
        raise Untraceable("it returns the wrong kind of number")
    if dtype == torch.bool and not (isinstance(x, Tensor) and id(x) in recorder.names):
        return "(h >= 0)" if x else "(h < 0)"  # a number of the kernel, where Python's would be a constant
    return recorder.name_of(x, dtype)


def _number(name: str) -> Tensor:
    """What stands for a number while the function runs: any values do, and none may come of the caller's generator."""
    if name in _SHAPES:
        return torch.zeros(_SHAPES[name], dtype=torch.int64, device="cpu")
    return torch.linspace(0.1, 0.9, 16, device="cpu").view(2, 2, 2, 2)


def trace(name: str, function: Callable, device: torch.device, gradient: bool = False, first: int = 0) -> Traced:
    """`name`: of NUMBERS; `gradient`: of the derivative of score_mod, a function of (dscore, score, ...) instead;
    `first`: the number of its first table. Raises Untraceable."""
    info = Tables(*(torch.zeros(2, dtype=torch.int64, device="cpu") for _ in _LENGTHS))
    numbers = {n: _number(n) for n in NUMBERS[name]}
    stand_ins = _StandIns([*numbers.values(), *info], device, first)
    stand_ins.numbers_of.update((id(x), (x, f"lengths[{n}]")) for n, x in enumerate(info))
    recorder = _Recorder({id(x): (x, n) for n, x in numbers.items()}, stand_ins.numbers_of)
    parameters = [*numbers]
    dtype = torch.bool if name == "mask_mod" else torch.float32

    def call():
        with recorder, stand_ins:
            return function(*numbers.values(), SeqlenInfo(numbers["b"], info))

    try:
        # What the function makes itself, on whatever device is the default, is made beside the numbers.
        with torch.device("cpu"), torch.inference_mode(False), torch.set_grad_enabled(gradient):
            if not gradient:
                result = _result(call(), dtype, recorder)
            else:
                dscore = _number("dscore")
                recorder.names[id(dscore)] = dscore, "dscore"
                parameters.insert(0, "dscore")
                numbers["score"].requires_grad_()
                s, du = call(), None
                if isinstance(s, Tensor) and s.requires_grad:
                    recorder.is_autograd = True
                    with recorder:
                        (du,) = torch.autograd.grad(s.expand(2, 2, 2, 2), numbers["score"], dscore, allow_unused=True)
                result = "tl.zeros_like(dscore)" if du is None else _result(du, dtype, recorder)
    except Untraceable:
        raise
    except Exception as e:  # a branch on a number, an operation without broadcasting, ...
        raise Untraceable(f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}") from None
    source = "\n    ".join(
        [f"def mod({', '.join(parameters)}, lengths, tables, sizes):", *recorder.lines, f"return {result}"]
    )
    return Traced(_compiled(source + "\n"), tuple(stand_ins.tables))


@functools.lru_cache(1024)
def _compiled(source: str):
    """The Triton function of a source: one object for one text, by which kernels are told apart."""
    name = f"<score function {abs(hash(source)):x}>"
    linecache.cache[name] = (len(source), None, source.splitlines(True), name)
    helpers = (look_up, larger, smaller, sign, remainder, quotient, whole_quotient, tanh)
    scope = {"tl": tl, "__name__": __name__, **{f.__name__: f for f in helpers}}
    exec(compile(source, name, "exec"), scope)
    return triton.jit(scope["mod"])
