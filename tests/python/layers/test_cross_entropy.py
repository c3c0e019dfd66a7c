"""Cross entropy against its formula in float64."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from flash_attn.losses.cross_entropy import CrossEntropyLoss
from flash_attn.ops import _blocks
from flash_attn.ops.triton.cross_entropy import cross_entropy_loss
from support import device
from torch.utils._python_dispatch import TorchDispatchMode

from layers.judge import DTYPES, judge

pytestmark = pytest.mark.device

IGNORED = -100


def formula(logits, labels, smoothing=0.0, scale=1.0, z_scale=0.0, ignore_index=IGNORED):
    """The loss of each row, in fp32 as a lower dtype's plain arithmetic would have it."""
    x = (logits if logits.dtype == torch.float64 else logits.float()) * scale
    lse = torch.logsumexp(x, -1)
    kept = labels != ignore_index
    of_label = x.gather(1, labels.masked_fill(~kept, 0)[:, None])[:, 0]
    loss = lse - (1 - smoothing) * of_label - smoothing * x.mean(-1) + z_scale * lse.square()
    return loss * kept


@pytest.fixture(params=[1 << 18, 100], ids=["one block", "blocks"])
def blocks(request, monkeypatch):
    monkeypatch.setattr(_blocks, "_CPU", request.param)


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients(dtype, blocks):
    labels = torch.randint(0, 41, (23,))
    labels[[0, 5, 22]] = IGNORED
    for smoothing, scale, z_scale, inplace in itertools.product((0.0, 0.9), (1.0, 0.7), (0.0, 1e-2), (False, True)):
        judge(
            lambda logits, s=smoothing, c=scale, z=z_scale, p=inplace: cross_entropy_loss(
                logits * 1, labels, None, s, c, z, inplace_backward=p
            )[0],
            lambda logits, s=smoothing, c=scale, z=z_scale: formula(logits, labels, s, c, z),
            {"logits": (3 * torch.randn(23, 41)).to(dtype).requires_grad_()},
            terms=4,
            luck=2,  # both are fp32 arithmetic: of the same errors, in another order
        )


def test_z_losses_and_reductions():
    logits, labels = torch.randn(7, 9, dtype=torch.float64), torch.tensor([1, -1, 3, 8, 0, -1, 2])
    each = formula(logits, labels, 0.1, 1.3, 0.2, ignore_index=-1)
    z = 0.2 * torch.logsumexp(logits * 1.3, -1).square() * (labels != -1)
    for reduction, take in (("none", lambda x: x), ("sum", torch.sum), ("mean", lambda x: x.sum() / 5)):
        loss = CrossEntropyLoss(-1, reduction, 0.1, 1.3, 0.2, return_z_loss=True)
        got, got_z = loss(logits.clone().requires_grad_(), labels)
        assert torch.allclose(got, take(each), rtol=1e-13) and torch.allclose(got_z, take(z), rtol=1e-13)
        assert got.requires_grad and not got_z.requires_grad
    assert CrossEntropyLoss()(logits.float(), labels.abs()).dtype == torch.float32
    with pytest.raises(NotImplementedError, match="reduction"):
        CrossEntropyLoss(reduction="max")


def test_gradcheck():
    logits, labels = torch.randn(4, 5, dtype=torch.float64, requires_grad=True), torch.tensor([1, IGNORED, 4, 0])
    for smoothing, z_scale in itertools.product((0.0, 0.1), (0.0, 0.3)):
        assert torch.autograd.gradcheck(
            lambda x, s=smoothing, z=z_scale: cross_entropy_loss(x, labels, None, s, 0.8, z)[0], logits
        )


def test_precomputed_lse():
    """It is taken where it can be, and only there."""
    logits, labels = torch.randn(5, 7), torch.randint(0, 7, (5,))
    lse = torch.logsumexp(logits, -1)
    assert torch.allclose(cross_entropy_loss(logits, labels, lse)[0], formula(logits, labels), atol=1e-6)
    assert torch.allclose(cross_entropy_loss(logits, labels, lse + 1)[0], formula(logits, labels) + 1, atol=1e-6)
    for options in ({"label_smoothing": 0.1}, {"logit_scale": 0.5}):
        assert torch.equal(
            cross_entropy_loss(logits, labels, lse + 1, **options)[0], cross_entropy_loss(logits, labels, **options)[0]
        )
    assert torch.allclose(CrossEntropyLoss()(logits, labels, lse + 1), formula(logits, labels).mean() + 1, atol=1e-6)


def test_in_place_backward_uses_the_logits_memory():
    logits = torch.randn(6, 8, requires_grad=True)
    work = logits * 1
    loss = cross_entropy_loss(work, torch.arange(6), inplace_backward=True)[0].sum()
    (g,) = torch.autograd.grad(loss, work, retain_graph=True)
    assert g.data_ptr() == work.data_ptr()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, work)


def test_memory(monkeypatch):
    """Beside the logits: one tensor of their size for the gradient, or none; and temporaries of a block."""

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(t, torch.Tensor) and t.numel() == logits.numel() and t.data_ptr() not in seen:
                    seen.add(t.data_ptr())
            return out

    for limit in ("_CPU", "_DEVICE"):
        monkeypatch.setattr(_blocks, limit, 200)
    labels = torch.randint(0, 50, (64,))
    for inplace, expected in ((False, 1), (True, 0)):
        logits = torch.randn(64, 50).bfloat16().requires_grad_()
        seen = {logits.data_ptr()}
        with Largest():
            loss = cross_entropy_loss(logits, labels, label_smoothing=0.1, inplace_backward=inplace)[0]
            torch.autograd.grad(loss.sum(), logits)
        assert len(seen) - 1 == expected


def test_what_is_ignored_spreads_nothing():
    logits, labels = torch.randn(3, 5), torch.tensor([1, IGNORED, 2])
    logits[1] = torch.nan
    logits[2, 0] = -torch.inf
    logits.requires_grad_()
    loss, z_loss = cross_entropy_loss(logits, labels, lse_square_scale=0.1)
    (g,) = torch.autograd.grad(loss.sum(), logits)
    assert loss.isfinite().all() and loss[1] == 0 and z_loss[1] == 0
    assert g.isfinite().all() and not g[1].any() and g[2, 0] == 0


def test_strides_and_empty():
    logits, labels = torch.randn(9, 6).t(), torch.randint(0, 9, (6,), dtype=torch.int32)
    assert torch.allclose(cross_entropy_loss(logits, labels)[0], formula(logits, labels.long()), atol=1e-6)
    wide = torch.randn(6, 12).requires_grad_()
    loss = cross_entropy_loss((wide * 1)[:, :9], labels, inplace_backward=True)[0]
    (g,) = torch.autograd.grad(loss.sum(), wide)
    (exact,) = torch.autograd.grad(formula(wide[:, :9], labels.long()).sum(), wide)
    assert torch.allclose(g, exact, atol=1e-6)
    empty = torch.randn(0, 5, requires_grad=True)
    loss, _ = cross_entropy_loss(empty, torch.zeros(0, dtype=torch.long))
    assert loss.shape == (0,) and torch.autograd.grad(loss.sum(), empty)[0].shape == (0, 5)


LOGITS, LABELS = torch.randn(3, 4), torch.tensor([0, 1, 2])
REFUSED = {
    "three dimensions": ((LOGITS[None], LABELS), "logits: expected 2 dimensions (batch, vocab_size), got (1, 3, 4)"),
    "integers": ((LOGITS.long(), LABELS), "logits: expected floating point"),
    "labels' shape": ((LOGITS, LABELS[:2]), "labels: expected shape (batch,) = (3,), got (2,)"),
    "labels' dtype": ((LOGITS, LABELS.float()), "labels: expected integers"),
    "too large": ((LOGITS, LABELS + 2), "labels: expected 0 to 3, or ignore_index = -100, got 4"),
    "negative": ((LOGITS, LABELS - 1), "labels: expected 0 to 3, or ignore_index = -100, got -1"),
    "lse": ((LOGITS, LABELS, LOGITS), "precomputed_lse: expected shape (batch,) = (3,)"),
}
OF_VALUES = {"too large", "negative"}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_words(case):
    if case in OF_VALUES and device.DEVICE != "cpu":
        pytest.skip("numbers on a device are not read")
    args, words = REFUSED[case]
    with pytest.raises((ValueError, TypeError), match=re.escape(words)):
        cross_entropy_loss(*args)
