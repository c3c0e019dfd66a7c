"""What the core launches of a recording is what Triton's launcher would be given for the same call."""

from __future__ import annotations

import os

import flash_attn
import pytest
import torch
from flash_attn import _C
from flash_attn._engines import Tensors
from support import engine_cases
from support.device_tensors import OfFramework
from support.problem import GROUPS

pytest.importorskip("triton", reason="triton is not installed")

if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    pytest.skip("Triton's interpreter has no launcher", allow_module_level=True)

from flash_attn._engines.triton import TritonEngine, forget  # noqa: E402
from support.stub_launches import Triton  # noqa: E402

NAME = "launched"
ENGINE = TritonEngine()


@pytest.fixture
def triton(monkeypatch):
    every = flash_attn.features()
    dtypes = ("bfloat16", "float16", "float32")
    flash_attn.register_backend(
        NAME, ENGINE, devices=("cuda",), dtypes=dtypes, serves=every, backward=every, before="cpu"
    )
    stub = Triton(monkeypatch)
    try:
        yield stub
    finally:
        stub.close()
        flash_attn.unregister_backend(NAME)


def like(x):
    """Other memory of the same layout, aligned as x is."""
    if x is None:
        return None
    span = 1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
    extra = 16 // x.element_size()
    memory = torch.empty(span + 2 * extra, dtype=x.dtype)
    start = next(i for i in range(extra + 1) if (memory.data_ptr() + i * x.element_size() - x.data_ptr()) % 16 == 0)
    return memory.as_strided(x.shape, x.stride(), start)


class Call:
    """A call of the core on tensors that claim to be on a device."""

    def __init__(self, x, options, *, is_backward=False, dlse=False, lse=True):
        q, k, v = x
        options = dict(options)
        left, right = options.pop("window", (-1, -1))
        fields = {"window_size_left": left, "window_size_right": right, "softmax_scale": options.pop("scale", None)}
        if "seed" in options:
            state = options.pop("seed"), options.pop("offset")
            options["dropout_state"] = torch.tensor([n - (n >> 63 << 64) for n in state])
        self.is_backward = is_backward
        self.groups = {Group: {} for Group in GROUPS}
        for Group, names in GROUPS.items():
            for name in [n for n in (*options, *fields) if names.get(n, n) in Group._fields]:
                value = options.pop(name) if name in options else fields.pop(name)
                self.groups[Group][name] = value
        assert not options and not fields
        out = q.new_empty((*q.shape[:-1], v.shape[-1]))
        rows = (q.shape[1], q.shape[0]) if q.dim() == 3 else (q.shape[0], q.shape[2], q.shape[1])
        scores = self.groups[next(G for G in GROUPS if G.__name__ == "Scores")]
        self.t = {"q": q, "k": k, "v": v, "out": out, "lse": torch.empty(rows) if lse or is_backward else None}
        if is_backward:
            self.t |= {"dout": torch.empty_like(out), **{"d" + n: torch.empty(y.shape, dtype=y.dtype) for n, y in
                       zip("qkv", x, strict=True)}, "dlse": torch.empty(rows) if dlse else None}  # fmt: skip
            for name in ("bias", "sink"):
                y = scores.get(name)
                self.t["d" + name] = None if y is None else torch.empty(y.shape)
        self.numbers = {}
        for given in self.groups.values():
            for name, value in given.items():
                if isinstance(value, torch.Tensor):
                    self.t[name] = value
                else:
                    self.numbers[name] = value
        for side in "qk":
            if (cu := self.t.get("cu_seqlens_" + side)) is not None:
                self.numbers["max_seqlen_" + side] = int(cu.diff().max()) if cu.numel() > 1 else 0

    def elsewhere(self) -> Call:
        """The same call on other memory."""
        other = object.__new__(Call)
        other.__dict__.update(self.__dict__)
        other.t = {name: like(x) for name, x in self.t.items()}
        return other

    def _groups(self, make):
        filled = []
        for Group, names in GROUPS.items():
            given = {}
            for name in [n for n in (*self.t, *self.numbers) if names.get(n, n) in Group._fields]:
                if name in ("k", "v"):
                    continue
                given[names.get(name, name)] = make(self.t[name]) if name in self.t else self.numbers[name]
            filled.append(Group(**given))
        return filled

    def ask(self, **keywords):
        """-> what the core answers: the backend's name, or (name, HostedCall)."""
        made = {}

        def make(x):
            return None if x is None else made.setdefault(id(x), OfFramework(x))

        sequences, scores, dropout, new_keys, rotary = self._groups(make)
        t = {name: make(x) for name, x in self.t.items()}
        if self.is_backward:
            names = ("dout", "q", "k", "v", "out", "lse", "dq", "dk", "dv", "dlse", "dbias", "dsink")
            return _C.backward(*(t.get(n) for n in names), sequences, scores, dropout, None, **keywords)
        return _C.forward(
            *(t.get(n) for n in ("q", "k", "v", "out", "lse")), sequences, scores, dropout, None, new_keys, rotary,
            **keywords,
        )  # fmt: skip

    def run(self, answer) -> None:
        """In Python, by the engine."""
        sequences, scores, dropout, new_keys, rotary = self._groups(lambda x: x)
        gradients = tuple(self.t.get(n) for n in ("dout", "dq", "dk", "dv", "dlse", "dbias", "dsink"))
        t = Tensors(*(self.t[n] for n in ("q", "k", "v", "out", "lse")), sequences, scores, dropout, new_keys, rotary,
                    gradients)  # fmt: skip
        (ENGINE.backward if self.is_backward else ENGINE.forward)(answer[1], t)


def check(triton, call: Call) -> bool:
    """Whether it was recorded; if so, what the core launches is what Triton would launch."""
    before = _C.recordings()
    answer = call.ask()
    if isinstance(answer, str):  # nothing to write
        return False
    call.run(answer)  # compiles
    call.run(call.ask())  # records
    other = call.elsewhere()
    triton.by_python.clear()
    other.run(other.ask(veto=()))  # a veto bypasses what was recorded
    expected = triton.parameters(other.t)
    OfFramework.allocated.clear()
    served = other.ask()
    if not isinstance(served, str):
        assert _C.recordings() == before
        return False
    assert served == NAME and not OfFramework.live
    assert triton.launched(OfFramework.allocated[0] if OfFramework.allocated else (0, 0)) == expected
    return True


# Problems whose memory is filled before the kernels run: torch does that, in Python.
FILLED = {
    False: {"packed, used"},
    True: {"packed, used", "used", "used, a number", "left padding"},
}


@pytest.mark.parametrize("is_backward", [False, True])
def test_every_feature(triton, is_backward):
    m = engine_cases.Maker(torch.bfloat16)
    cases = list(engine_cases.single_features(m))
    if not is_backward:
        cases += list(engine_cases.cache_features(m))
    python_only = set()
    for name, x, options in cases:
        for more in ({"dlse": True}, {}) if is_backward else ({}, {"lse": False}):
            if not check(triton, Call(x, options, is_backward=is_backward, **more)):
                python_only.add(name)
            forget()
    nothing = {"no queries", "batch 0"} if not is_backward else {"batch 0"}
    assert python_only == FILLED[is_backward] | nothing


@pytest.mark.parametrize("seed", range(150))
def test_random_problems(triton, seed):
    m = engine_cases.Maker(torch.bfloat16 if seed % 2 else torch.float16, seed=seed)
    x, options = engine_cases.random_problem(seed, m, most=400)
    some = x[0].numel() > 0
    assert check(triton, Call(x, options)) == some
    recorded = check(triton, Call(x, options, is_backward=True, dlse=seed % 3 == 0))
    assert recorded == (not options.keys() & {"seqused_k", "leftpad_k"}) or not some
