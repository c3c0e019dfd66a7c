"""LayerNorm and RMSNorm, with dropout, scales and residuals, against their formulas in float64."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from flash_attn.ops import _blocks, _norm
from flash_attn.ops.layer_norm import (
    DropoutAddLayerNorm,
    dropout_add_layer_norm,
    dropout_add_layer_norm_parallel_residual,
    dropout_add_layer_norm_subset,
    layer_norm,
)
from flash_attn.ops.rms_norm import (
    DropoutAddRMSNorm,
    dropout_add_rms_norm,
    dropout_add_rms_norm_parallel_residual,
    dropout_add_rms_norm_subset,
    rms_norm,
)
from flash_attn.ops.rms_norm import RMSNorm as OldRMSNorm
from flash_attn.ops.triton.layer_norm import (
    RMSNorm,
    layer_norm_fn,
    layer_norm_linear_fn,
    layer_norm_ref,
    rms_norm_fn,
    rms_norm_ref,
)
from support import device
from torch.utils.flop_counter import FlopCounterMode

from layers.judge import DTYPES, is_float, judge, run

pytestmark = pytest.mark.device

SHAPE, COLUMNS, EPS = (3, 5, 24), 24, 1e-3
KINDS = pytest.mark.parametrize("is_rms_norm", [False, True], ids=["layer", "rms"])


@pytest.fixture(autouse=True, params=["core", "one block", "blocks"])
def _way(request, monkeypatch):
    """What the core serves, by the core; or all by torch's operations, in one block of rows, or in several."""
    if request.param != "core":
        monkeypatch.setattr(_norm, "core_serves", lambda *_: False)
    if request.param == "blocks":
        for limit in ("_CPU", "_DEVICE"):
            monkeypatch.setattr(_blocks, limit, 100)


def normalised(h, weight, bias, is_rms_norm, eps=EPS):
    if not is_rms_norm:
        h = h - h.mean(-1, keepdim=True)
    y = h / torch.sqrt(h.square().mean(-1, keepdim=True) + eps) * weight
    return y if bias is None else y + bias


def formula(
    x, weight, bias, residual=None, x1=None, weight1=None, bias1=None, *, is_rms_norm, masks=(None, None), p=0.0,
    rowscale=None, shift=0.0, prenorm=True, kinds=(None, None),
):  # fmt: skip
    """kinds: the dtypes of y and of the stream, that a lower dtype's arithmetic is rounded to."""

    def dropped(t, mask):
        return t if mask is None else t * mask / (1 - p)

    h = dropped(x if rowscale is None else x * rowscale[..., None].to(x.dtype), masks[0])
    if x1 is not None:
        h = h + dropped(x1, masks[1])
    if residual is not None:
        h = h + residual
    ys = [normalised(h, w + shift, b, is_rms_norm) for w, b in ((weight, bias), (weight1, bias1)) if w is not None]
    results = [*ys, h] if prenorm else ys
    if h.dtype != torch.float64:
        results = [t.to(k) for t, k in zip(results, [kinds[0]] * len(ys) + [kinds[1]], strict=False)]
    return tuple(results)


def inputs(dtype, weight_dtype=None, residual=None, x1=False, weight1=False, bias=True) -> dict:
    """Tensors by name; residual: its dtype."""
    weight_dtype = weight_dtype or dtype
    made = {
        "x": torch.randn(SHAPE).to(dtype),
        "weight": torch.randn(COLUMNS).to(weight_dtype),
        "bias": torch.randn(COLUMNS).to(weight_dtype) if bias else None,
        "residual": None if residual is None else torch.randn(SHAPE).to(residual),
        "x1": torch.randn(SHAPE).to(dtype) if x1 else None,
        "weight1": torch.randn(COLUMNS).to(weight_dtype) if weight1 else None,
        "bias1": torch.randn(COLUMNS).to(weight_dtype) if weight1 and bias else None,
    }
    return {n: t.requires_grad_() if is_float(t) else t for n, t in made.items()}


@KINDS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual", ["none", "same", "fp32"])
def test_values_and_gradients(dtype, residual, is_rms_norm):
    function = rms_norm_fn if is_rms_norm else layer_norm_fn
    kind = {"none": None, "same": dtype, "fp32": torch.float32}[residual]
    for x1, weight1, bias, centered, in_fp32 in itertools.product((False, True), repeat=5):
        stream = kind or (torch.float32 if in_fp32 else dtype)
        given = inputs(dtype, torch.float32 if in_fp32 else None, kind, x1, weight1, bias)
        judge(
            lambda f=function, c=centered, i=in_fp32, **t: f(
                **t, eps=EPS, prenorm=True, residual_in_fp32=i, zero_centered_weight=c
            ),
            lambda s=stream, c=centered, **t: formula(**t, is_rms_norm=is_rms_norm, shift=float(c), kinds=(dtype, s)),
            given,
            terms=8,  # dx is a difference of products of dy, the weight and x
            luck=1 if dtype != torch.float32 else 2,
        )


@KINDS
@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout_and_rowscale(dtype, is_rms_norm):
    """The masks that are returned are those that were applied, forward and backward."""
    function = rms_norm_fn if is_rms_norm else layer_norm_fn
    p, rowscale = 0.3, torch.rand(SHAPE[:-1])
    for x1, scaled, residual in itertools.product((False, True), (False, True), (None, torch.float32)):
        if x1 and scaled:
            continue
        given = inputs(dtype, residual=residual, x1=x1, weight1=x1)
        scale = rowscale if scaled else None
        found = []

        def drop(found=found, scale=scale, **t):
            torch.manual_seed(3)
            *results, mask, mask1 = function(
                **t, eps=EPS, dropout_p=p, rowscale=scale, prenorm=True, return_dropout_mask=True
            )
            found[:] = mask, mask1
            return tuple(results)

        run(drop, given)
        assert found[0].dtype == torch.bool and (found[1] is None) == (not x1)
        judge(
            drop,
            lambda m=tuple(found), s=scale, r=residual, **t: formula(
                **t, is_rms_norm=is_rms_norm, masks=m, p=p, rowscale=s, kinds=(dtype, r or dtype)
            ),
            given,
            terms=8,
            luck=1 if dtype != torch.float32 else 2,
        )


def test_how_much_is_dropped():
    x, ones = torch.ones(200, 500), torch.ones(500)
    _, h, mask, mask1 = rms_norm_fn(x, ones, None, x1=x, dropout_p=0.17, prenorm=True, return_dropout_mask=True)
    for m in (mask, mask1):
        assert abs(float(m.float().mean()) - 0.83) < 0.006  # five deviations
    assert float((mask == mask1).float().mean()) < 0.75  # they are independent
    assert torch.allclose(h, (mask.float() + mask1.float()) / 0.83)
    y, mask, mask1 = rms_norm_fn(x, ones, None, return_dropout_mask=True)
    assert mask is None and mask1 is None and torch.allclose(y, x)
    assert not rms_norm_fn(x, ones, None, dropout_p=1.0).any()


@KINDS
def test_leaves_have_gradients_of_their_own(is_rms_norm):
    """x, x1 and the residual get one gradient. What is added to that of one must not come to the others."""
    function = rms_norm_fn if is_rms_norm else layer_norm_fn
    given = inputs(torch.float32, residual=torch.float32, x1=True)
    for _ in range(2):
        function(**given)[..., 0].square().sum().backward()
    twice = {name: given[name].grad.clone() for name in ("x", "x1", "residual")}
    once = torch.autograd.grad(function(**given)[..., 0].square().sum(), given["x"])[0]
    for grad in twice.values():
        torch.testing.assert_close(grad, 2 * once)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (7,), (1, 1), (3, 5, 127), (2, 1030), (130, 33)])
def test_rms_norm_of_odd_sizes(shape, dtype):
    """More rows than a partial sum of dweight has, more columns than a strip, and few of either."""
    rows = torch.Size(shape[:-1]).numel()
    for residual, centered in itertools.product((None, torch.float32), (False, True)):
        given = {
            "x": torch.randn(shape).to(dtype).requires_grad_(),
            "weight": torch.randn(shape[-1]).to(dtype).requires_grad_(),
            "bias": None,
            "residual": None if residual is None else torch.randn(shape).requires_grad_(),
        }
        judge(
            lambda c=centered, **t: rms_norm_fn(**t, eps=EPS, prenorm=True, zero_centered_weight=c),
            lambda c=centered, k=residual or dtype, **t: formula(
                **t, is_rms_norm=True, shift=float(c), kinds=(dtype, k)
            ),
            given,
            terms=8 + rows**0.5,
            luck=1 if dtype != torch.float32 else 2,
        )


@pytest.fixture
def core_calls(monkeypatch):
    """Counts what the compiled core computes."""
    calls = []
    for name in ("rms_norm", "rms_norm_backward"):
        function = getattr(_norm._C, name)
        monkeypatch.setattr(_norm._C, name, lambda *args, f=function: calls.append(args) or f(*args))
    return calls


@device.cpu_only("the core")
@pytest.mark.parametrize("_way", ["core"], indirect=True)
def test_what_the_core_computes(core_calls):
    """RMSNorm of ordinary tensors of the CPU, with no more before it than a residual. All else is torch's."""
    x, w = torch.randn(SHAPE), torch.rand(COLUMNS)

    def computed(function=rms_norm_fn, x=x, weight=w, bias=None, **keywords) -> int:
        before = len(core_calls)
        function(x, weight, bias, **keywords)
        return len(core_calls) - before

    assert computed() == computed(x=x.bfloat16(), weight=w.half(), residual=x, out_dtype=torch.float16) == 1
    assert computed(x=x.transpose(0, 1)) == computed(residual_in_fp32=True, prenorm=True) == 1
    assert computed(zero_centered_weight=True) == computed(out=torch.empty(SHAPE)) == 1
    assert computed(lambda *t: rms_norm(t[0], t[1], EPS)) == 1
    assert computed(lambda *t: layer_norm_linear_fn(*t, w[None], None, is_rms_norm=True)) == 1
    assert computed(lambda *t: RMSNorm(COLUMNS)(t[0].clone().requires_grad_()).square().sum().backward()) == 2
    for other in (
        dict(function=layer_norm_fn), dict(bias=w), dict(x1=x), dict(weight1=w), dict(dropout_p=0.5),
        dict(rowscale=torch.rand(SHAPE[:-1])), dict(x=x.double()), dict(weight=w.double()), dict(x=x[:0]),
        dict(x=torch.randn(COLUMNS, 5).T), dict(out_dtype=torch.float64),
        dict(x=x.to("meta"), weight=w.to("meta")),
    ):  # fmt: skip
        assert computed(**other) == 0, other
    with FlopCounterMode(display=False):
        assert computed() == 0
    x.requires_grad_()
    before = len(core_calls)
    rms_norm_fn(x, w, None).sum().backward()  # an expanded gradient
    assert len(core_calls) == before + 1


@KINDS
def test_results_and_dtypes(is_rms_norm):
    function = rms_norm_fn if is_rms_norm else layer_norm_fn
    given = {n: t.detach() if is_float(t) else t for n, t in inputs(torch.bfloat16).items()}
    assert isinstance(function(**given), torch.Tensor)
    y, h = function(**given, prenorm=True)
    assert y.dtype == h.dtype == torch.bfloat16 and torch.equal(h, given["x"])
    y, h = function(**given, prenorm=True, residual_in_fp32=True, out_dtype=torch.float32)
    assert y.dtype == h.dtype == torch.float32
    out, residual_out = torch.empty(SHAPE), torch.empty(5, 3, COLUMNS).transpose(0, 1)
    y2, h2 = function(**given, prenorm=True, out=out, residual_out=residual_out)
    assert torch.equal(out, y) and torch.equal(residual_out, h) and torch.equal(y2, y) and torch.equal(h2, h)
    with torch.no_grad():
        turned = given | {"x": given["x"].transpose(0, 1).contiguous().transpose(0, 1)}
        assert torch.equal(function(**turned), function(**given))


@KINDS
def test_gradcheck(is_rms_norm):
    function = rms_norm_fn if is_rms_norm else layer_norm_fn

    def tensor(*shape):
        return torch.randn(shape, dtype=torch.float64, requires_grad=True)

    given = tensor(4, 6), tensor(6), tensor(6), tensor(4, 6), tensor(4, 6), tensor(6), tensor(6)
    assert torch.autograd.gradcheck(lambda *t: function(*t, prenorm=True), given)
    for unused in (0, 1, 2):  # a result that takes no part
        assert torch.autograd.gradcheck(
            lambda *t, u=unused: tuple(y for i, y in enumerate(function(*t, prenorm=True)) if i != u), given
        )


@KINDS
def test_the_references_are_the_formula(is_rms_norm):
    reference = rms_norm_ref if is_rms_norm else layer_norm_ref
    given = inputs(torch.float64, residual=torch.float64, x1=True, weight1=True)
    masks = torch.rand(SHAPE) > 0.3, torch.rand(SHAPE) > 0.3
    got = reference(**given, eps=EPS, dropout_p=0.3, prenorm=True, zero_centered_weight=True, dropout_mask=masks[0],
                    dropout_mask1=masks[1])  # fmt: skip
    for a, b in zip(got, formula(**given, is_rms_norm=is_rms_norm, masks=masks, p=0.3, shift=1.0), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-13)
    x = torch.randn(SHAPE).bfloat16()
    upcast = reference(
        x, torch.ones(COLUMNS).bfloat16(), None, eps=EPS, upcast=True, rowscale=torch.full(SHAPE[:-1], 2.0)
    )
    exact = normalised(2 * x.double(), 1.0, None, is_rms_norm)
    assert upcast.dtype == torch.bfloat16 and float((upcast - exact).abs().max()) <= 2**-8 * float(exact.abs().max())


@KINDS
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_of_a_norm(dtype, is_rms_norm):
    for residual, bias in itertools.product((None, torch.float32), (False, True)):
        x, weight, norm_bias, before, *_ = inputs(dtype, residual=residual, bias=bias).values()
        given = dict(x=x, norm_weight=weight, norm_bias=norm_bias, residual=before)
        given["linear_weight"] = (torch.randn(7, COLUMNS) / 5).to(dtype).requires_grad_()
        given["linear_bias"] = torch.randn(7).to(dtype).requires_grad_() if bias else None

        def exact(x, norm_weight, norm_bias, residual, linear_weight, linear_bias, r=residual):
            y, h = formula(x, norm_weight, norm_bias, residual, is_rms_norm=is_rms_norm, kinds=(dtype, r or dtype))
            return torch.nn.functional.linear(y, linear_weight, linear_bias), h

        judge(
            lambda **t: layer_norm_linear_fn(**t, eps=EPS, prenorm=True, is_rms_norm=is_rms_norm),
            exact,
            given,
            terms=8,
            luck=2,  # the plain arithmetic rounds as often, elsewhere
        )
    with torch.autocast(torch.device(device.DEVICE).type, torch.bfloat16):
        args = torch.randn(2, 8), torch.ones(8), None, torch.randn(3, 8, requires_grad=True), None
        out = layer_norm_linear_fn(*args)
    assert out.dtype == torch.bfloat16
    assert torch.autograd.grad(out.sum(), args[3])[0].dtype == torch.float32


def test_the_module():
    for centered in (False, True):
        module = RMSNorm(COLUMNS, dropout_p=0.5, zero_centered_weight=centered)
        assert module.bias is None and torch.equal(module.weight, torch.full((COLUMNS,), 0.0 if centered else 1.0))
        x = torch.randn(SHAPE)
        expected = normalised(x, 1.0, None, True, eps=1e-5)
        assert torch.allclose(module.eval()(x), expected, atol=1e-6)
        y, h = module(x, residual=x, prenorm=True)
        assert torch.equal(h, 2 * x) and (module.train()(x) == 0).float().mean() > 0.3
    assert RMSNorm(4, dtype=torch.bfloat16).weight.dtype == torch.bfloat16
    old = OldRMSNorm(COLUMNS, 1e-5)
    assert old.bias is None and torch.allclose(old(x), expected, atol=1e-6)


OLD = {
    False: (dropout_add_layer_norm, dropout_add_layer_norm_subset, dropout_add_layer_norm_parallel_residual),
    True: (dropout_add_rms_norm, dropout_add_rms_norm_subset, dropout_add_rms_norm_parallel_residual),
}


@KINDS
@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout_add(dtype, is_rms_norm):
    """Of the older extension: two scales, uint8 masks, z in x0's dtype."""
    function, p = OLD[is_rms_norm][0], 0.2
    rowscale = torch.rand(SHAPE[:-1])
    for residual, scaled, in_fp32 in itertools.product((None, dtype, torch.float32), (False, True), (False, True)):
        stream = residual or (torch.float32 if in_fp32 else dtype)
        given = inputs(dtype, residual=residual)
        given = {n: given[n] for n in ("x", "residual", "weight", "bias")}
        given["layerscale"] = torch.rand(COLUMNS).to(dtype).requires_grad_() if scaled else None
        found = []

        def drop(x, found=found, scaled=scaled, i=in_fp32, **t):
            torch.manual_seed(5)
            z, h, mask = function(x, **t, dropout_p=p, epsilon=EPS, rowscale=rowscale if scaled else None, prenorm=True,
                                  residual_in_fp32=i, return_dropout_mask=True)  # fmt: skip
            found[:] = [mask]
            return z, h

        run(drop, given)
        assert found[0].dtype == torch.uint8

        def exact(x, weight, bias, residual, layerscale, m=found[0], scaled=scaled, s=stream):
            x = x if layerscale is None else x * layerscale
            return formula(x, weight, bias, residual, is_rms_norm=is_rms_norm, masks=(m, None), p=p,
                           rowscale=rowscale if scaled else None, kinds=(dtype, s))  # fmt: skip

        judge(drop, exact, given, terms=8, luck=1 if dtype != torch.float32 else 2)


@KINDS
def test_dropout_add_results(is_rms_norm):
    function, _, parallel = OLD[is_rms_norm]
    x, w = torch.randn(SHAPE), torch.rand(COLUMNS)
    assert isinstance(function(x, None, w, None, 0.0, EPS), torch.Tensor)
    z, mask = function(x, None, w, None, 0.0, EPS, return_dropout_mask=True)
    assert torch.equal(mask, torch.ones(SHAPE, dtype=torch.uint8))
    simple = rms_norm(x, w, EPS) if is_rms_norm else layer_norm(x, w, torch.zeros(COLUMNS), EPS)
    assert torch.allclose(z, simple, atol=1e-6) and torch.allclose(z, normalised(x, w, None, is_rms_norm), atol=1e-5)
    z0, z1 = parallel(x, None, None, w, None, None, None, 0.0, EPS)
    assert z1 is None and torch.equal(z0, z)
    z0, z1, h, m0, m1 = parallel(x, x, x, w, None, w + 1, None, 0.0, EPS, prenorm=True, return_dropout_mask=True)
    assert torch.allclose(h, 3 * x) and m0.all() and m1.all()
    assert torch.allclose(z1, normalised(3 * x, w + 1, None, is_rms_norm), atol=1e-5)
    module = (DropoutAddRMSNorm if is_rms_norm else DropoutAddLayerNorm)(COLUMNS, prenorm=True, p=0.5)
    z, h = module.eval()(x, x)
    assert torch.equal(h, 2 * x) and torch.allclose(z, normalised(h, 1.0, None, is_rms_norm, 1e-5), atol=1e-5)
    _, h = module.train()(x)
    assert 0.3 < (h == 0).float().mean() < 0.7


@KINDS
def test_dropout_add_subset(is_rms_norm):
    """Rows without x0, and rows whose result is not wanted: drop path."""
    function, p = OLD[is_rms_norm][1], 0.25
    given = {
        "x0": torch.randn(2, 3, COLUMNS),
        "residual": torch.randn(4, 3, COLUMNS),
        "weight": torch.randn(COLUMNS),
        "bias": torch.randn(COLUMNS),
        "layerscale": torch.rand(COLUMNS),
    }
    given = {n: t.requires_grad_() for n, t in given.items()}
    present = torch.tensor([True, False, False, True]).repeat_interleave(3)
    wanted = torch.tensor([False, True, True, True]).repeat_interleave(3)
    x0_subset, out_subset = ((m.cumsum(0) * m).int().view(4, 3) for m in (present, wanted))
    found = []

    def drop(**t):
        torch.manual_seed(5)
        z, h, mask = function(**t, dropout_p=p, epsilon=EPS, x0_subset=x0_subset, out_subset=out_subset,
                              rowscale_const=1.5, out_numrows=9, prenorm=True, return_dropout_mask=True)  # fmt: skip
        found[:] = [mask]
        return z, h

    z, h = run(drop, given)[0]
    assert z.shape == (3, 3, COLUMNS) and h.shape == (4, 3, COLUMNS) and found[0].shape == (2, 3, COLUMNS)

    def exact(x0, residual, weight, bias, layerscale):
        x = torch.zeros(12, COLUMNS, dtype=x0.dtype)
        x = x.index_put((present.nonzero()[:, 0],), (x0 * layerscale * found[0] * 1.5 / (1 - p)).flatten(0, 1))
        h = x + residual.flatten(0, 1)
        return normalised(h, weight, bias, is_rms_norm)[wanted].view(3, 3, -1), h.view(4, 3, -1)

    judge(drop, exact, given, terms=8, luck=2)
    full = dict(given, x0=given["residual"], residual=None)
    z = function(**full, dropout_p=0.0, epsilon=EPS, rowscale_const=2.0)
    h = 2 * given["residual"] * given["layerscale"]
    assert torch.allclose(z, normalised(h, given["weight"], given["bias"], is_rms_norm), atol=1e-4)


@KINDS
def test_second_derivatives_raise(is_rms_norm):
    """The mean and the deviation are kept as numbers: what a second derivative made of them would be wrong."""
    x, w = torch.randn(3, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    y = (rms_norm_fn if is_rms_norm else layer_norm_fn)(x, w, None)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_nan_that_is_dropped():
    x = torch.full((400, 8), torch.nan)
    _, h, mask, _ = rms_norm_fn(x, torch.ones(8), None, dropout_p=0.5, prenorm=True, return_dropout_mask=True)
    assert torch.equal(h.isnan(), mask) and not h[~mask].any()


def test_rows_and_no_rows():
    for function in (layer_norm_fn, rms_norm_fn):
        x, w = torch.randn(0, 8, requires_grad=True), torch.randn(8, requires_grad=True)
        y = function(x, w, w)
        assert y.shape == (0, 8)
        dx, dw = torch.autograd.grad(y.sum(), (x, w))
        assert dx.shape == (0, 8) and not dw.any()
        x = torch.randn(8, requires_grad=True)
        assert function(x, w, None).shape == (8,)
        nan = torch.randn(3, 8)
        nan[1, 2] = torch.nan
        y = function(nan, w, None)
        assert y[1].isnan().all() and y[[0, 2]].isfinite().all()


X, W = torch.randn(2, 3, 4), torch.randn(4)
REFUSED = {
    "weight": (dict(weight=W[:3]), "weight: expected shape (4,), got (3,)"),
    "no weight": (dict(weight=None), "weight: expected shape (4,), got None"),
    "bias": (dict(bias=W[:1]), "bias: expected shape (4,), got (1,)"),
    "residual": (dict(residual=X[0]), "residual: expected shape (2, 3, 4), got (3, 4)"),
    "x1": (dict(x1=X[:1]), "x1: expected shape (2, 3, 4), got (1, 3, 4)"),
    "rowscale": (dict(rowscale=torch.ones(2)), "rowscale: expected shape (2, 3), got (2,)"),
    "rowscale and x1": (dict(rowscale=torch.ones(2, 3), x1=X), "rowscale: expected none beside x1"),
    "probability": (dict(dropout_p=1.5), "dropout_p: expected a probability, got 1.5"),
    "learned rowscale": (dict(rowscale=torch.ones(2, 3, requires_grad=True)), "rowscale has no gradient here"),
    "out": (dict(out=torch.empty(2, 4)), "out: expected shape (2, 3, 4), got (2, 4)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_words(case):
    given, words = REFUSED[case]
    with pytest.raises((ValueError, NotImplementedError), match=re.escape(words)):
        rms_norm_fn(**(dict(x=X, weight=W, bias=None) | given))
