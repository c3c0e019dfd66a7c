"""The two ways in for tensors: the C exchange table of the type, and the capsule of __dlpack__."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch
from flash_attn import _C
from support.groups import groups


class OnlyCapsule:
    """A tensor type with `__dlpack__` alone, as every producer had before the exchange table."""

    def __init__(self, tensor: torch.Tensor, versioned: bool = False):
        self.tensor = tensor
        self.max_version = {"max_version": (1, 0)} if versioned else {}

    def __dlpack__(self):
        return self.tensor.__dlpack__(**self.max_version)


class OnlyCapsuleWithDetach(OnlyCapsule):
    def detach(self):
        return OnlyCapsule(self.tensor.detach())


def forward(q, k, v, out, lse=None, **kwargs):
    _C.forward(q, k, v, out, lse, *groups(causal=True, **kwargs))


def problem(dtype=torch.float32):
    q, k, v = (torch.randn(2, 7, h, 24).to(dtype) for h in (4, 2, 2))
    out = torch.empty_like(q)
    forward(q, k, v, out)
    return q, k, v, out


VERSIONED = [False]
if int(torch.__version__.split(".")[1]) >= 9:  # __dlpack__(max_version=...) gives a versioned capsule
    VERSIONED.append(True)


@pytest.mark.parametrize("versioned", VERSIONED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_capsules_are_the_same_call(dtype, versioned):
    q, k, v, expected = problem(dtype)
    out, lse = torch.empty_like(q), torch.empty(2, 4, 7)
    forward(*(OnlyCapsule(x, versioned) for x in (q, k, v, out, lse)))
    assert torch.equal(out, expected) and lse.isfinite().all()


def test_capsules_keep_strides_and_offsets():
    q, k, v, expected = problem()
    wide = torch.zeros(2, 4, 9, 30)
    strided = wide[:, :, 1:8, 3:27].transpose(1, 2)
    strided.copy_(q)
    out = torch.empty(4, 2, 7, 24).permute(1, 2, 0, 3)
    forward(*(OnlyCapsule(x) for x in (strided, k, v, out)))
    assert torch.equal(out, expected)


def test_what_records_gradients_is_detached_first():
    q, k, v, expected = problem()
    out = torch.empty_like(q)
    q.requires_grad_()
    forward(OnlyCapsuleWithDetach(q), k, v, out)
    assert torch.equal(out, expected)
    forward(q, k, v, out)
    assert torch.equal(out, expected)


def test_capsules_are_freed():
    q, k, v, _ = problem()
    wrapped = OnlyCapsule(q.clone())
    alive = weakref.ref(wrapped.tensor)
    forward(wrapped, k, v, torch.empty_like(q))
    del wrapped
    gc.collect()
    assert alive() is None


def test_numpy_arrays_are_tensors_too():
    q, k, v, expected = problem()
    out = np.empty(tuple(q.shape), dtype=np.float32)
    forward(q.numpy(), k.numpy(), v.numpy(), out)
    assert np.array_equal(out, expected.numpy())


def test_integers_through_both_ways():
    q, k, v = (torch.randn(9, h, 16) for h in (4, 2, 2))
    cu = torch.tensor([0, 4, 9], dtype=torch.int32)
    outs = []
    for lengths in (cu, OnlyCapsule(cu)):
        outs.append(torch.empty_like(q))
        forward(q, k, v, outs[-1], cu_seqlens_q=lengths, cu_seqlens_k=lengths)
    assert torch.equal(*outs)


def test_not_a_capsule():
    class Liar:
        def __dlpack__(self):
            return 3

    q, k, v, _ = problem()
    with pytest.raises(TypeError, match="k: its __dlpack__"):
        forward(q, Liar(), v, torch.empty_like(q))


def test_an_exception_of_the_producer_arrives():
    class Broken:
        def __dlpack__(self):
            raise OSError("out of order")

    q, k, v, _ = problem()
    with pytest.raises(OSError, match="out of order"):
        forward(q, Broken(), v, torch.empty_like(q))


def test_the_interpreter_runs_while_kernels_do():
    """Two calls at once from two threads, with the lock switching often: results as from one."""
    import sys
    import threading

    q, k, v, expected = problem()
    results = [[] for _ in range(4)]

    def work(mine):
        for _ in range(200):
            out = torch.empty_like(q)
            forward(q, k, v, out)
            mine.append(torch.equal(out, expected))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work, args=(mine,)) for mine in results]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    finally:
        sys.setswitchinterval(interval)
    assert all(len(mine) == 200 and all(mine) for mine in results)
