"""torch.nn.functional.scaled_dot_product_attention routed to us, against PyTorch's math backend."""

from __future__ import annotations

import flash_attn
import pytest
import torch
import torch.nn.functional as F
from flash_attn.integrations import sdpa
from support import device
from support.compare import assert_as_exact
from torch.nn.attention import SDPBackend, sdpa_kernel

pytestmark = pytest.mark.device

EPS = torch.finfo(torch.float32).eps
KNOWS_GROUPS = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 5)
needs_2_5 = pytest.mark.skipif(
    not KNOWS_GROUPS, reason="PyTorch 2.4 knows no enable_gqa, and gives NaN for masked rows"
)


def shapes(*qkv, mask=None, **options):
    return qkv, mask, options


B, H, L, S, E = 2, 4, 7, 11, 16
QKV = (B, H, L, E), (B, H, S, E), (B, H, S, E)
CASES = {
    "plain": shapes(*QKV),
    "scale": shapes(*QKV, scale=0.3),
    "values' own headdim": shapes((B, H, L, E), (B, H, S, E), (B, H, S, 24)),
    "causal": shapes(*[(B, H, L, E)] * 3, is_causal=True),
    "causal, more keys": shapes(*QKV, is_causal=True),
    "causal, fewer keys": shapes((B, H, S, E), (B, H, L, E), (B, H, L, E), is_causal=True),
    "causal, one key": shapes((B, H, L, E), (B, H, 1, E), (B, H, 1, E), is_causal=True),
    "gqa": shapes((B, H, L, E), (B, 2, S, E), (B, 2, S, E), enable_gqa=True),
    "gqa, causal, masked heads": shapes((B, H, L, E), (B, 2, S, E), (B, 2, S, E), mask=(H, L, S), enable_gqa=True),
    "mask": shapes(*QKV, mask=(B, H, L, S)),
    "mask of keys": shapes(*QKV, mask=(B, 1, 1, S)),
    "mask of rows and keys": shapes(*QKV, mask=(L, S)),
    "mask of rows": shapes(*QKV, mask=(B, 1, L, 1)),
    "mask of one dimension": shapes(*QKV, mask=(S,)),
    "three dimensions": shapes((B, L, E), (B, S, E), (B, S, E), mask=(B, L, S)),
    "two dimensions": shapes((L, E), (S, E), (S, E), mask=(L, S)),
    "five dimensions": shapes((3, B, H, L, E), (3, B, H, S, E), (3, B, H, S, E), mask=(3, 1, 1, L, S)),
    "five dimensions, one mask": shapes((3, B, H, L, E), (3, B, H, S, E), (3, B, H, S, E), mask=(B, 1, L, S)),
    "one head of keys": shapes((B, H, L, E), (B, 1, S, E), (B, 1, S, E)),
    "one head of queries": shapes((B, 1, L, E), (B, H, S, E), (B, H, S, E), mask=(B, H, L, S)),
    "one head of keys, many of values": shapes((B, H, L, E), (B, 1, S, E), (B, H, S, E)),
    "one sequence of keys": shapes((B, H, L, E), (1, H, S, E), (1, H, S, E)),
    "fewer dimensions of keys": shapes((B, H, L, E), (H, S, E), (S, E)),
}


def inputs(case, kind="added", dtype=torch.float32):
    qkv, mask, options = CASES[case]
    qkv = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in qkv]
    if mask is not None and kind == "added":
        mask = torch.randn(mask, dtype=dtype, requires_grad=True)
    elif mask is not None:
        mask = torch.rand(mask) < 0.5
        mask.view(-1, mask.shape[-1])[0] = False  # rows that see nothing
    return qkv, mask, options


def with_gradients(function, qkv, mask, options, dout):
    out = function(*qkv, mask, **options)
    wanted = [*qkv, *([mask] if mask is not None and mask.requires_grad else [])]
    return [out, *torch.autograd.grad(out, wanted, dout.to(out.dtype).expand_as(out))]


def math(*arguments, **options):
    with sdpa_kernel(SDPBackend.MATH):
        return sdpa._own(*arguments, **options)


@pytest.fixture
def only_ours(monkeypatch):
    def fail(*_, **__):
        raise AssertionError("went to PyTorch's own function")

    monkeypatch.setattr(sdpa, "_own", fail)


KINDS = [(case, kind) for case, (_, mask, _) in CASES.items() for kind in (("added", "bool") if mask else ("none",))]


@needs_2_5
@pytest.mark.parametrize("case, kind", KINDS)
def test_values_and_gradients(case, kind, request):
    qkv, mask, options = inputs(case, kind)
    dout = torch.randn(())
    wide = [x.detach().double().requires_grad_() for x in qkv]
    wide_mask = mask.detach().double().requires_grad_() if mask is not None and kind == "added" else mask
    truth = with_gradients(math, wide, wide_mask, options, dout)
    expected = with_gradients(math, qkv, mask, options, dout)
    request.getfixturevalue("only_ours")
    got = with_gradients(sdpa.scaled_dot_product_attention, qkv, mask, options, dout)
    # A gradient that cancels to 0 (of a row with one key) is a difference of rounded numbers of this size.
    size = max(x.abs().max().item() for x in truth)
    for x, y, exact in zip(got, expected, truth, strict=True):
        assert x.shape == y.shape and x.dtype == y.dtype
        error, plain = ((a - exact).abs().max().item() for a in (x, y))
        assert error <= 2 * plain + 4 * EPS * size


@needs_2_5
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["causal", "gqa", "mask", "one head of keys"])
def test_sixteen_bits(case, dtype, only_ours, monkeypatch):
    qkv, mask, options = inputs(case, dtype=dtype)
    got = sdpa.scaled_dot_product_attention(*qkv, mask, **options)
    monkeypatch.undo()
    exact = math(*(x.double() for x in qkv), None if mask is None else mask.double(), **options)
    assert got.dtype == dtype
    assert_as_exact(*(x.detach() for x in (got, exact, math(*qkv, mask, **options))), case, 0, 0)


def test_rows_that_see_nothing_are_zero(only_ours):
    q, mask = torch.randn(1, 2, 3, 8, requires_grad=True), torch.tensor([True, False, True])[:, None].expand(3, 3)
    out = sdpa.scaled_dot_product_attention(q, q, q, mask)
    (dq,) = torch.autograd.grad(out.sum(), q)
    assert not out[:, :, 1].any() and out[:, :, 0].all() and dq.isfinite().all()


class Watched(torch.Tensor):
    pass


def tensor(*shape, **options):
    return torch.randn(shape or (B, H, L, E), **options)


NESTED = torch.nested.nested_tensor([torch.randn(3, 8), torch.randn(5, 8)], layout=torch.jagged)
REFUSED = {
    "subclass": (lambda: ([tensor().as_subclass(Watched)] * 3, {}), "query: a Watched"),
    "nested": (lambda: ([NESTED.unsqueeze(2).transpose(1, 2)] * 3, {}), "query: a NestedTensor"),
    "float64, nobody named": (lambda: ([tensor(dtype=torch.float64)] * 3, {}), "dtype torch.float64"),
    "integers": (lambda: ([tensor().int()] * 3, {}), "dtype torch.int32"),
    "dtypes": (lambda: ([tensor(), tensor().bfloat16(), tensor()], {}), "dtypes that differ"),
    "empty": (lambda: ([tensor(B, H, 0, E), tensor(), tensor()], {}), "an empty tensor"),
    "mask beside causal": (
        lambda: ([tensor()] * 3, dict(attn_mask=torch.ones(L, L).bool(), is_causal=True)),
        "attn_mask beside is_causal",
    ),
    "mask's dtype": (lambda: ([tensor()] * 3, dict(attn_mask=torch.ones(L, L).double())), "attn_mask: dtype"),
    "mask that fits the values only": (
        lambda: ([tensor(1, H, L, E), tensor(1, H, L, E), tensor()], dict(attn_mask=torch.ones(B, H, L, L).bool())),
        "attn_mask: (2, 4, 7, 7) does not broadcast to (1, 4, 7, 7)",
    ),
    "mask's shape": (lambda: ([tensor()] * 3, dict(attn_mask=torch.ones(L, 3))), "attn_mask: (7, 3) does not"),
    "shapes": (lambda: ([tensor(), tensor(3, H, S, E), tensor(3, H, S, E)], {}), "shapes that do not fit"),
    "headdim": (lambda: ([tensor(), tensor(B, H, L, 8), tensor()], {}), "shapes that do not fit"),
    "gqa": (lambda: ([tensor(), tensor(B, 3, L, E), tensor(B, 3, L, E)], dict(enable_gqa=True)), "enable_gqa: 4 heads"),
    "dimensions": (lambda: ([tensor(8)] * 3, {}), "query: 1 dimensions"),
    "meta": (lambda: ([tensor(device="meta")] * 3, {}), "somebody traces the call"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_pytorchs_own_where_we_refuse(case):
    """The same result, or the same error."""
    make, reason = REFUSED[case]
    qkv, options = make()
    assert sdpa.refuses(*qkv, **options).startswith(reason)
    try:
        expected = sdpa._own(*qkv, **options)
    except Exception as error:
        with pytest.raises(type(error)) as raised:
            sdpa.scaled_dot_product_attention(*qkv, **options)
        assert str(raised.value) == str(error)
    else:
        got = sdpa.scaled_dot_product_attention(*qkv, **options)
        assert type(got) is type(expected) and got.shape == expected.shape
        if not (got.is_meta or got.is_nested):
            assert torch.equal(got, expected)


@device.cpu_only("the oracle")
def test_float64_by_the_oracle_if_it_is_chosen(only_ours):
    q = tensor(dtype=torch.float64)
    with flash_attn.backend("reference"):
        got = sdpa.scaled_dot_product_attention(q, q, q)
    torch.testing.assert_close(got, (q @ q.mT / E**0.5).softmax(-1) @ q, rtol=0, atol=1e-12)


def test_derivatives_that_torch_func_takes_are_pytorchs():
    q = tensor()

    def ours(x):
        return sdpa.scaled_dot_product_attention(x, x, x)

    with sdpa_kernel(SDPBackend.MATH):
        torch.testing.assert_close(torch.func.vmap(ours)(q), sdpa._own(q, q, q))
        _, tangent = torch.func.jvp(ours, (q,), (q,))
        _, expected = torch.func.jvp(lambda x: sdpa._own(x, x, x), (q,), (q,))
    torch.testing.assert_close(tangent, expected)


def test_dropout_repeats_with_the_seed(only_ours):
    q, draws = tensor(1, 2, 64, 8), []
    ones = torch.ones_like(q)
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(sdpa.scaled_dot_product_attention(q, q, ones, dropout_p=0.25))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert abs(draws[0].mean().item() - 1) < 0.1  # the weights that are kept are scaled up


def test_autocast(only_ours):
    q, mask = tensor(), torch.randn(L, L)
    with torch.autocast(torch.device(device.DEVICE).type, dtype=torch.bfloat16):
        assert sdpa.scaled_dot_product_attention(q, q.bfloat16(), q, mask).dtype == torch.bfloat16


def test_switches():
    own = F.scaled_dot_product_attention
    assert own is sdpa._own
    with sdpa.routed():
        assert F.scaled_dot_product_attention is sdpa.scaled_dot_product_attention
        with pytest.raises(KeyError), sdpa.routed():
            raise KeyError
        assert F.scaled_dot_product_attention is sdpa.scaled_dot_product_attention
        sdpa.disable()
        assert F.scaled_dot_product_attention is sdpa.scaled_dot_product_attention
    assert F.scaled_dot_product_attention is own
    sdpa.enable()
    sdpa.enable()
    with sdpa.routed():
        pass
    assert F.scaled_dot_product_attention is sdpa.scaled_dot_product_attention
    sdpa.disable()
    assert F.scaled_dot_product_attention is own


def test_modules_of_pytorch_are_routed(monkeypatch):
    layer = torch.nn.MultiheadAttention(16, 4, batch_first=True)
    x = torch.randn(2, 5, 16)
    expected, _ = layer(x, x, x, need_weights=False)
    with sdpa.routed(), monkeypatch.context() as patch:
        patch.setattr(sdpa, "_own", None)
        got, _ = layer(x, x, x, need_weights=False)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mask", [None, torch.ones(L, L).tril().bool()])
def test_compiled_in_one_graph(mask):
    """A graph that was traced before belongs to the function that was routed then."""
    q, graphs = tensor(), []
    torch.compiler.reset()

    def keep(graph, _):
        graphs.append(graph.print_readable(print_output=False))
        return graph

    compiled = torch.compile(lambda q: F.scaled_dot_product_attention(q, q, q, mask), backend=keep, fullgraph=True)
    expected = compiled(q)
    with sdpa.routed():
        got = compiled(q)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
    assert ["flash_attn" in graph for graph in graphs] == [False, True]
