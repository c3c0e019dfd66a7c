"""Rotary embedding against the rotation of complex numbers in float64."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from flash_attn.layers.rotary import (
    RotaryEmbedding,
    apply_rotary_emb,
    apply_rotary_emb_kv_,
    apply_rotary_emb_qkv_,
    apply_rotary_emb_torch,
)
from flash_attn.ops import _rotary
from flash_attn.ops.triton.rotary import apply_rotary
from support import device

from layers.judge import DTYPES, judge

pytestmark = pytest.mark.device

BATCH, SEQLEN, HEADS, HEADDIM, LENGTH = 3, 17, 2, 16, 41


def turned(x, cos, sin, positions, interleaved=False):
    """x (..., nheads, headdim), positions (...): the pair (a, b) as a + ib, times cos + i sin of its row's position."""
    half = cos.shape[-1]
    cos, sin = cos[positions][..., None, :].to(x.dtype), sin[positions][..., None, :].to(x.dtype)
    first = slice(0, 2 * half, 2) if interleaved else slice(0, half)
    second = slice(1, 2 * half, 2) if interleaved else slice(half, 2 * half)
    a, b = x[..., first], x[..., second]
    y = x.clone()
    y[..., first], y[..., second] = a * cos - b * sin, a * sin + b * cos
    return y


def tables(half: int, dtype: torch.dtype, length: int = LENGTH):
    angle = torch.rand(length, half, dtype=torch.float64) * 6.28
    return angle.cos().to(dtype), angle.sin().to(dtype)


OFFSETS = {"0": 0, "number": 7, "tensor": torch.tensor([5, 0, 24]), "int32": torch.tensor([0, 3, 9], dtype=torch.int32)}


def rows(offsets, seqlen: int = SEQLEN):
    first = offsets.long() if isinstance(offsets, torch.Tensor) else torch.full((BATCH,), offsets)
    return first[:, None] + torch.arange(seqlen)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offsets", OFFSETS)
def test_values_and_gradients(dtype, offsets):
    for fraction, interleaved, inplace, narrow in itertools.product(
        (1, 2), (False, True), (False, True), (False, True)
    ):
        cos, sin = tables(HEADDIM // 2 // fraction, dtype if narrow else torch.float32)
        x = torch.randn(BATCH, SEQLEN, HEADS, HEADDIM).to(dtype).requires_grad_()
        judge(
            lambda x, i=interleaved, p=inplace, c=cos, s=sin: apply_rotary_emb(x, c, s, i, p, OFFSETS[offsets]),
            lambda x, i=interleaved, c=cos, s=sin: turned(x, c, s, rows(OFFSETS[offsets]), i),
            {"x": x},
            terms=1,
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offsets", [0, 4, torch.tensor([5, 0, 24])])
def test_packed_sequences(dtype, offsets):
    """Lengths 5, 0 and 12 in 20 rows: the last three belong to none, and do not turn."""
    cu_seqlens = torch.tensor([0, 5, 5, 17], dtype=torch.int32)
    cos, sin = tables(4, dtype)
    first = offsets if isinstance(offsets, torch.Tensor) else torch.tensor([offsets] * 3)
    positions = torch.cat([first[0] + torch.arange(5), first[2] + torch.arange(12)])
    for interleaved, inplace in itertools.product((False, True), (False, True)):
        judge(
            lambda x, i=interleaved, p=inplace: apply_rotary_emb(x, cos, sin, i, p, offsets, cu_seqlens, 12),
            lambda x, i=interleaved: torch.cat([turned(x[:17], cos, sin, positions, i), x[17:]]),
            {"x": torch.randn(20, HEADS, HEADDIM).to(dtype).requires_grad_()},
            terms=1,
        )


CORE_SHAPES = {  # of memory, its permutation, columns that are used
    "odd": ((3, 5, 3, 7), None, 7),
    "one column": ((3, 5, 3, 1), None, 1),
    "wide": ((3, 5, 2, 530), None, 530),
    "one row": ((3, 1, 4, 128), None, 128),
    "no row": ((3, 0, 4, 16), None, 16),
    "no sequence": ((0, 5, 4, 16), None, 16),
    "heads outside": ((3, 4, 5, 64), (0, 2, 1, 3), 64),
    "sequences inside": ((5, 3, 2, 40), (1, 0, 2, 3), 40),
    "columns of more": ((3, 5, 2, 48), None, 33),
}


@pytest.fixture
def core_calls(monkeypatch):
    """Counts what the compiled core turns."""
    calls, rotate = [], _rotary._C.rotate
    monkeypatch.setattr(_rotary._C, "rotate", lambda *args: calls.append(args) or rotate(*args))
    return calls


@device.cpu_only("the core")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", CORE_SHAPES)
def test_the_core_and_torch_agree(shape, dtype, core_calls, monkeypatch):
    """Within a rounding, and neither is further from the formula than one."""
    memory, order, columns = CORE_SHAPES[shape]
    given = torch.randn(memory).to(dtype)

    def view(memory):
        return memory.permute(order or (0, 1, 2, 3))[..., :columns]

    x = view(given)
    batch, seqlen = x.shape[:2]
    for half, interleaved, inplace, conjugate, several in itertools.product(
        {0, 1, columns // 4, columns // 2} & set(range(columns // 2 + 1)), *[(False, True)] * 4
    ):
        cos, sin = tables(half, torch.float32 if several else dtype)
        offsets = torch.arange(batch) if several else 2

        def turn(t=(cos, sin, offsets, None, None, interleaved, inplace, conjugate)):
            return apply_rotary(view(given.clone()), *t)

        got = turn()
        with monkeypatch.context() as m:
            m.setattr(_rotary, "core_serves", lambda *_: False)
            by_torch = turn()
        first = offsets if several else torch.full((batch,), 2)
        exact = turned(
            x.double(), cos.double(), (-sin if conjugate else sin).double(),
            first[:, None] + torch.arange(seqlen), interleaved,
        )  # fmt: skip
        rounding = torch.finfo(dtype).eps / 2 * exact.abs() + 16 * torch.finfo(torch.float32).eps
        assert ((got.double() - exact).abs() <= rounding).all()
        assert ((by_torch.double() - exact).abs() <= rounding).all()
        assert torch.equal(got[..., 2 * half :], x[..., 2 * half :])
    assert len(core_calls) >= 16


@device.cpu_only("the core")
@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch's, of vmap over its own operations
def test_what_the_core_turns(core_calls):
    """Ordinary tensors of the CPU; torch has all else, and its words for memory that may not be written to."""
    cos, sin = tables(4, torch.float32)
    x = torch.randn(2, 5, 2, 16)

    def turned_by_core(function, *args, **keywords) -> int:
        before = len(core_calls)
        function(*args, **keywords)
        return len(core_calls) - before

    apply = apply_rotary_emb
    assert turned_by_core(apply, x, cos, sin) == 1
    assert turned_by_core(apply, x.bfloat16(), cos, sin.half(), inplace=True) == 1
    assert turned_by_core(apply, x[0, 0].expand(2, 5, 2, 16), cos, sin) == 1
    assert turned_by_core(lambda: apply(x.clone().requires_grad_(), cos, sin).square().sum().backward()) == 2
    assert turned_by_core(apply_rotary_emb_qkv_, torch.randn(2, 5, 3, 2, 16), cos, sin) == 1
    assert turned_by_core(apply_rotary_emb_qkv_, torch.randn(2, 5, 3, 2, 16), cos, sin, cos, sin) == 2
    assert turned_by_core(apply_rotary_emb_kv_, torch.randn(2, 5, 2, 2, 16), cos, sin) == 1
    assert turned_by_core(apply, x.double(), cos, sin) == 0
    assert turned_by_core(apply, x, cos.double(), sin) == 0
    assert turned_by_core(apply, x.mT, *tables(1, torch.float32)) == 0
    assert turned_by_core(apply, x.to("meta"), cos.to("meta"), sin.to("meta")) == 0
    assert turned_by_core(torch.func.vmap(lambda x: apply_rotary(x, cos, sin)), x[None].bfloat16()) == 0
    with pytest.raises(RuntimeError, match="single memory location"):
        apply(x[0, 0].expand(2, 5, 2, 16), cos, sin, inplace=True)
    with torch.inference_mode():
        made = torch.randn(2, 5, 2, 16)
        assert turned_by_core(apply, made, cos, sin, inplace=True) == 1
    with pytest.raises(RuntimeError, match="inference tensor"):
        apply(made, cos, sin, inplace=True)


def test_autograd_knows_what_was_written():
    """A tensor that was saved for a gradient and then turned in place may not be used for it."""
    cos, sin = tables(4, torch.float32)
    for turn, shape in ((apply_rotary_emb, (2, 5, 2, 16)), (apply_rotary_emb_qkv_, (2, 5, 3, 2, 16))):
        x, w = torch.randn(shape), torch.randn(shape, requires_grad=True)
        y = (x * w).sum()
        turn(x, cos, sin, **({"inplace": True} if turn is apply_rotary_emb else {}))
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward()


def split_qkv(qkv, queries: int | None):
    return qkv.unbind(2) if queries is None else qkv.split([queries, (qkv.shape[2] - queries) // 2] + [
        (qkv.shape[2] - queries) // 2], dim=2)  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("queries", [None, 4], ids=["packed", "grouped"])
def test_qkv(dtype, queries):
    cos, sin = tables(4, dtype)
    own = tables(4, dtype)
    shape = (BATCH, SEQLEN, 3, HEADS, HEADDIM) if queries is None else (BATCH, SEQLEN, queries + 2 * 2, HEADDIM)
    for (cos_k, sin_k), interleaved, offsets in itertools.product(
        ((None, None), own), (False, True), (0, 3, torch.tensor([5, 0, 24]))
    ):

        def formula(qkv, c=cos_k, s=sin_k, i=interleaved, o=offsets):
            q, k, v = split_qkv(qkv, queries)
            q, k = turned(q, cos, sin, rows(o), i), turned(k, *(own if c is not None else (cos, sin)), rows(o), i)
            return torch.stack((q, k, v), 2) if queries is None else torch.cat((q, k, v), 2)

        judge(
            lambda qkv, c=cos_k, s=sin_k, i=interleaved, o=offsets: apply_rotary_emb_qkv_(
                qkv, cos, sin, c, s, i, o, queries
            ),
            formula,
            {"qkv": torch.randn(shape).to(dtype).requires_grad_()},
            terms=1,
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_kv(dtype):
    cos, sin = tables(4, dtype)
    for interleaved, offsets in itertools.product((False, True), (0, torch.tensor([5, 0, 24]))):
        judge(
            lambda kv, i=interleaved, o=offsets: apply_rotary_emb_kv_(kv, cos, sin, i, o),
            lambda kv, i=interleaved, o=offsets: torch.stack(
                (turned(kv[:, :, 0], cos, sin, rows(o), i), kv[:, :, 1]), 2
            ),
            {"kv": torch.randn(BATCH, SEQLEN, 2, HEADS, HEADDIM).to(dtype).requires_grad_()},
            terms=1,
        )


@pytest.mark.parametrize("interleaved", [False, True])
def test_in_place_is_in_place(interleaved):
    """The memory of the argument holds the result, whatever its strides. Out of place it stays."""
    cos, sin = tables(4, torch.float32)
    memory = torch.randn(BATCH, HEADS, HEADDIM, SEQLEN)
    x = memory.permute(0, 3, 1, 2)
    before = x.clone()
    expected = apply_rotary_emb(x, cos, sin, interleaved)
    assert torch.equal(x, before)
    out = apply_rotary_emb(x, cos, sin, interleaved, inplace=True)
    assert out.data_ptr() == x.data_ptr() and torch.allclose(x, expected, atol=1e-6) and not torch.equal(x, before)
    qkv = torch.randn(BATCH, SEQLEN, 3, HEADS, HEADDIM)
    assert apply_rotary_emb_qkv_(qkv, cos, sin).data_ptr() == qkv.data_ptr()
    kv = torch.randn(BATCH, SEQLEN, 2, HEADS, HEADDIM)
    assert apply_rotary_emb_kv_(kv, cos, sin).data_ptr() == kv.data_ptr()
    assert apply_rotary(x, cos, sin, inplace=True) is x


IN_PLACE = {
    "apply_rotary_emb": (lambda x, *t: apply_rotary_emb(x, *t, inplace=True), ()),
    "apply_rotary_emb_qkv_": (apply_rotary_emb_qkv_, (3,)),
    "apply_rotary_emb_kv_": (apply_rotary_emb_kv_, (2,)),
}
OWNERS = {"made": lambda x: x * 1, "view": lambda x: (x * 1).flatten(-2).unflatten(-1, (HEADS, HEADDIM))}
NO_OWNERS = {"leaf": lambda x: x, "of a leaf": lambda x: x[:], "of unbind": lambda x: (x * 1)[None].unbind(0)[0]}


@pytest.mark.parametrize("name", IN_PLACE)
@pytest.mark.parametrize("kind", [*OWNERS, *NO_OWNERS])
def test_who_goes_on_with_what_was_turned_in_place(kind, name):
    """Has the result's gradient, as of torch's own operations; where autograd allows no writing, the result has it."""
    function, parts = IN_PLACE[name]
    cos, sin = tables(4, torch.float64)
    shape = (BATCH, SEQLEN, *parts, HEADS, HEADDIM)
    given, weight = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)

    def gradient(make, goes_on: bool):
        x = given.clone().requires_grad_()
        y = make(x)
        result = function(y, cos, sin)
        return torch.autograd.grad(((y if goes_on else result) * weight).sum(), x)[0]

    turned = apply_rotary_emb(weight.flatten(2, -2), cos, -sin).view(shape)  # the gradient turns the other way
    if parts:
        turned[:, :, -1] = weight[:, :, -1]  # v's
    assert torch.allclose(gradient((OWNERS | NO_OWNERS)[kind], False), turned)
    if kind in OWNERS:
        assert torch.allclose(gradient(OWNERS[kind], True), turned)


def test_the_gradient_of_others_stays():
    """An addition hands one gradient to both its arguments: turning it in place would turn the other's, too."""
    cos, sin = tables(4, torch.float32)
    x, y = (torch.randn(BATCH, SEQLEN, HEADS, HEADDIM, requires_grad=True) for _ in range(2))
    g = torch.randn(BATCH, SEQLEN, HEADS, HEADDIM)
    (apply_rotary_emb(x * 1, cos, sin, inplace=True) + y).backward(g.clone())
    assert torch.equal(y.grad, g) and not torch.equal(x.grad, g)
    qkv = torch.randn(BATCH, SEQLEN, 3, HEADS, HEADDIM, requires_grad=True)
    apply_rotary_emb_qkv_(qkv * 1, cos, sin).sum().backward()  # an expanded gradient
    assert torch.equal(qkv.grad[:, :, 2], torch.ones(BATCH, SEQLEN, HEADS, HEADDIM))


def test_apply_rotary():
    """The conjugate is the inverse; there is no gradient, in words."""
    cos, sin = tables(8, torch.float64)
    x = torch.randn(BATCH, SEQLEN, HEADS, HEADDIM, dtype=torch.float64)
    for interleaved in (False, True):
        y = apply_rotary(x, cos, sin, 3, interleaved=interleaved)
        assert torch.allclose(y, turned(x, cos, sin, rows(3), interleaved), rtol=0, atol=1e-14)
        back = apply_rotary(y, cos, sin, 3, interleaved=interleaved, conjugate=True)
        assert torch.allclose(back, x, rtol=0, atol=1e-14)
    y = apply_rotary(x.requires_grad_(), cos, sin)
    with pytest.raises(NotImplementedError, match="apply_rotary_emb"):
        y.sum().backward()
    learned = apply_rotary_emb(x, cos.requires_grad_(), sin)
    with pytest.raises(NotImplementedError, match="cos and sin"):
        learned.sum().backward()


def test_gradcheck_and_the_plain_reference():
    cos, sin = tables(3, torch.float64)
    x = torch.randn(2, 4, 2, 8, dtype=torch.float64, requires_grad=True)
    for interleaved in (False, True):
        assert torch.autograd.gradcheck(lambda x, i=interleaved: apply_rotary_emb(x, cos, sin, i), x)
        plain = apply_rotary_emb_torch(x, cos[:4], sin[:4], interleaved)
        assert torch.allclose(plain, turned(x, cos, sin, torch.arange(4), interleaved), rtol=0, atol=1e-14)


@pytest.mark.parametrize("scale_base", [None, 512])
@pytest.mark.parametrize("kind", ["qkv", "q and kv", "grouped"])
def test_module(scale_base, kind):
    """Angles, XPos' scales about the middle of the table, and the cache that only grows."""
    dim, offset = 8, 2
    emb = RotaryEmbedding(dim, base=1000.0, scale_base=scale_base)
    position = torch.arange(SEQLEN + offset, dtype=torch.float64)
    column = torch.arange(0, dim, 2, dtype=torch.float64)
    angle = position[:, None] / 1000.0 ** (column / dim)
    scale = torch.ones_like(angle)
    if scale_base is not None:
        power = (position - (SEQLEN + offset) // 2) / scale_base
        scale = ((column + 0.4 * dim) / (1.4 * dim)) ** power[:, None]
    q_tables, k_tables = (angle.cos() * scale, angle.sin() * scale), (angle.cos() / scale, angle.sin() / scale)

    def exact(q, k):
        return turned(q, *q_tables, rows(offset)), turned(k, *k_tables, rows(offset))

    def close(x, y):
        return torch.allclose(x.double(), y, rtol=0, atol=1e-5)

    if kind == "q and kv":
        q, kv = torch.randn(BATCH, SEQLEN, 4, HEADDIM), torch.randn(BATCH, SEQLEN, 2, HEADS, HEADDIM)
        expected = exact(q.double(), kv[:, :, 0].double())
        out, out_kv = emb(q, kv, seqlen_offset=offset)
        assert close(out, expected[0]) and close(out_kv[:, :, 0], expected[1])
        return
    queries = 4 if kind == "grouped" else None
    shape = (BATCH, SEQLEN, 8, HEADDIM) if queries else (BATCH, SEQLEN, 3, HEADS, HEADDIM)
    qkv = torch.randn(shape)
    q, k, v = (t.double() for t in split_qkv(qkv.clone(), queries))
    expected = exact(q, k)
    out = split_qkv(emb(qkv, seqlen_offset=offset, num_heads_q=queries), queries)
    assert close(out[0], expected[0]) and close(out[1], expected[1]) and close(out[2], v)


def test_the_cache_of_the_module():
    emb = RotaryEmbedding(8).to(torch.bfloat16)  # as model.bfloat16() does to its buffers
    emb._update_cos_sin_cache(4000, device=torch.device(device.DEVICE), dtype=torch.float32)
    exact = torch.outer(torch.arange(4000).double(), 10000.0 ** (-torch.arange(0, 8, 2).double() / 8)).cos()
    assert torch.allclose(emb._cos_cached.double(), exact, rtol=0, atol=3e-4)  # fp32 angles up to 4000
    kept = emb._cos_cached
    emb(torch.randn(1, 5, 3, 2, 16), max_seqlen=5)
    assert emb._cos_cached is kept and emb._seq_len_cached == 4000
    emb(torch.randn(1, 5, 3, 2, 16).bfloat16())
    assert emb._cos_cached.dtype == torch.bfloat16 and emb._seq_len_cached == 5
    assert not list(emb.state_dict())
    with torch.inference_mode():
        emb(torch.randn(1, 9, 3, 2, 16))
    x = torch.randn(1, 9, 3, 2, 16, requires_grad=True)
    emb.eval()(x * 1).sum().backward()  # tables made in inference mode could not be saved
    assert x.grad is not None
    with pytest.raises(NotImplementedError, match="pos_idx_in_fp32"):
        RotaryEmbedding(8, pos_idx_in_fp32=False)


X, COS = torch.randn(2, 5, 2, 8), torch.randn(9, 4)
PACKED, CU = torch.randn(7, 2, 8), torch.tensor([0, 3, 7], dtype=torch.int32)
REFUSED = {
    "packed for padded": (lambda: apply_rotary_emb(PACKED, COS, COS), "x: expected 4 dimensions"),
    "cos of a batch": (lambda: apply_rotary_emb(X, COS[None], COS[None]), "cos: expected 2 dimensions"),
    "sin": (lambda: apply_rotary_emb(X, COS, COS[:4]), "sin: expected the shape of cos, (9, 4)"),
    "too wide": (lambda: apply_rotary_emb(X, torch.ones(9, 5), torch.ones(9, 5)), "rotary_dim <= headdim = 8, got 10"),
    "too short": (lambda: apply_rotary_emb(X, COS[:4], COS[:4]), "a row for each of 5 positions, got 4 rows"),
    "offset": (lambda: apply_rotary_emb(X, COS, COS, seqlen_offsets=5), "a row for each of 10 positions"),
    "negative": (lambda: apply_rotary_emb(X, COS, COS, seqlen_offsets=-1), "seqlen_offsets: expected 0 or more"),
    "offsets": (
        lambda: apply_rotary_emb(X, COS, COS, seqlen_offsets=torch.tensor([0, 5])),
        "a row for each of 10 positions",
    ),
    "negative offsets": (lambda: apply_rotary_emb(X, COS, COS, seqlen_offsets=torch.tensor([0, -1])), "0 or more"),
    "offsets' shape": (
        lambda: apply_rotary_emb(X, COS, COS, seqlen_offsets=torch.tensor([0])),
        "shape (batch,) = (2,)",
    ),
    "offsets' dtype": (lambda: apply_rotary_emb(X, COS, COS, seqlen_offsets=torch.zeros(2)), "int32 or int64"),
    "max_seqlen": (lambda: apply_rotary_emb(PACKED, COS, COS, cu_seqlens=CU), "max_seqlen: expected"),
    "packed, too short": (
        lambda: apply_rotary_emb(PACKED, COS[:3], COS[:3], cu_seqlens=CU, max_seqlen=4),
        "a row for each of 4 positions",
    ),
    "num_heads_q": (lambda: apply_rotary_emb_qkv_(torch.randn(2, 5, 6, 8), COS, COS), "num_heads_q: expected"),
    "odd heads": (
        lambda: apply_rotary_emb_qkv_(torch.randn(2, 5, 6, 8), COS, COS, num_heads_q=3),
        "num_heads_q: expected",
    ),
    "qkv": (lambda: apply_rotary_emb_qkv_(torch.randn(2, 5, 2, 2, 8), COS, COS), "qkv: expected shape"),
    "kv": (lambda: apply_rotary_emb_kv_(torch.randn(2, 5, 3, 2, 8), COS, COS), "kv: expected shape"),
    "module": (
        lambda: RotaryEmbedding(8)(torch.randn(2, 5, 3, 2, 8), seqlen_offset=torch.tensor([0, 1])),
        "max_seqlen: expected",
    ),
}
OF_VALUES = {"offsets", "negative offsets"}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_words(case):
    if case in OF_VALUES and device.DEVICE != "cpu":
        pytest.skip("numbers on a device are not read")
    call, words = REFUSED[case]
    with pytest.raises((ValueError, TypeError), match=re.escape(words)):
        call()
