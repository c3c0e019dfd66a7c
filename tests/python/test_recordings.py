"""What an engine has launched once on a device, the core launches again by itself: for which calls, for which not."""

from __future__ import annotations

import flash_attn
import pytest
import torch
from flash_attn import _C
from flash_attn._engines import Tensors
from support.device_tensors import CUDA, ROCM, OfFramework, OnDevice
from support.groups import groups

LAUNCH = (7, 3, 128, 1000, ["q", "out", b"\x01\x02", 16, "lse", "alibi_slopes", bytes(8)])
SERVES = {"devices": ("cuda",), "dtypes": ("bfloat16",), "serves": flash_attn.features(), "before": "cpu"}


@pytest.fixture
def launched():
    """The launches of the core, by a backend "toy" of CUDA devices."""
    flash_attn.register_backend("toy", object(), **SERVES)
    seen = []
    _C.launch_by(lambda *launch: seen.append(launch))
    OfFramework.allocated.clear()
    try:
        yield seen
    finally:
        _C.launch_by(None)
        flash_attn.unregister_backend("toy")


def call(change=None, *, make=OfFramework, veto=None, **options):
    """-> what the core answers, and the tensors. `change`: of the tensors by name."""
    shapes = {"q": (2, 6, 4, 16), "k": (2, 8, 2, 16), "v": (2, 8, 2, 16), "out": (2, 6, 4, 16)}
    t = {name: torch.zeros(*shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    if change:
        t |= change(t)
    tensors = {name: make(x) for name, x in t.items()}
    options = {name: make(x) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    names = ("q", "k", "v", "out", "lse")
    return _C.forward(*(tensors.get(n) for n in names), *groups(**options), veto=veto), t


def record(launches=(LAUNCH,), workspace=64, **options):
    (name, asked), _ = call(**options)
    assert name == "toy" and asked.recordable
    asked.record(list(launches), workspace)


def test_is_launched_with_the_tensors_stream_and_workspace_of_the_call(launched):
    record()
    for _ in range(2):
        answer, t = call()
        assert answer == "toy"
        (workspace, size), *others = OfFramework.allocated
        assert size == 64 and not others and not OfFramework.live
        values = [t["q"].data_ptr(), t["out"].data_ptr(), 0x0201, workspace + 16, 0, 0, 0]
        assert launched == [(7, 3, 128, 1000, OfFramework.stream, values)]
        launched.clear()
        OfFramework.allocated.clear()


def test_a_backward_has_a_key_of_its_own(launched):
    record()
    x = [OfFramework(torch.zeros(2, 8, 4, 16, dtype=torch.bfloat16)) for _ in range(8)]
    dout, q, k, v, out, dq, dk, dv = x
    lse = OfFramework(torch.zeros(2, 4, 8))
    flash_attn.register_backend("toy", object(), **SERVES, backward=flash_attn.features())
    name, asked = _C.backward(dout, q, k, v, out, lse, dq, dk, dv, None, None, None)
    asked.record([(8, 1, 32, 0, ["dq", "dlse"])])
    assert _C.backward(dout, q, k, v, out, lse, dq, dk, dv, None, None, None) == name == "toy"
    assert launched == [(8, 1, 32, 0, OfFramework.stream, [dq.x.data_ptr(), 0])]


OTHERS = {
    "shape": lambda t: {"k": t["k"][:, :7], "v": t["v"][:, :7]},
    "stride": lambda t: {"q": t["q"].transpose(1, 2).contiguous().transpose(1, 2)},
    "presence": lambda t: {"lse": torch.zeros(2, 4, 6)},
    "alignment": lambda t: {"q": torch.zeros(2 * 6 * 4 * 16 + 1, dtype=torch.bfloat16)[1:].view(2, 6, 4, 16)},
}
NUMBERS = [
    {"causal": True}, {"softmax_scale": 0.5}, {"softcap": 3.0}, {"window_size_left": 2}, {"window_size_right": 2},
    {"attention_chunk": 3}, {"used_k": 5}, {"deterministic": True}, {"positive_empty_lse": False}, {"prefer": "cpu"},
    {"backend": "toy"}, {"alibi_slopes": torch.zeros(4)}, {"seqused_k": torch.zeros(2, dtype=torch.int32)},
    {"learnable_sink": torch.zeros(4)}, {"learnable_sink": torch.zeros(4, dtype=torch.bfloat16)},
]  # fmt: skip


@pytest.mark.parametrize("what", OTHERS)
def test_other_tensors_are_another_call(launched, what):
    record()
    answer, _ = call(OTHERS[what])
    assert answer[0] == "toy" and not launched
    assert call()[0] == "toy"


@pytest.mark.parametrize("options", NUMBERS, ids=str)
def test_other_numbers_are_another_call(launched, options):
    record()
    answer, _ = call(**options)
    assert answer[0] == "toy" and not launched
    answer[1].record([LAUNCH], 64)
    assert call(**options)[0] == call()[0] == "toy" and len(launched) == 2


@pytest.mark.parametrize("change", ["added", "replaced", "variable", "forgotten"])
def test_what_may_change_the_choice_asks_again(launched, change, monkeypatch):
    record()
    if change == "added":
        flash_attn.register_backend("first", object(), **{**SERVES, "before": "toy"})
        try:
            assert call()[0][0] == "first"
        finally:
            flash_attn.unregister_backend("first")
    elif change == "replaced":
        flash_attn.register_backend("toy", object(), **SERVES)
    elif change == "variable":
        monkeypatch.setenv("FLASH_ATTENTION_BACKEND", "toy")
    else:
        _C.forget_recordings()
    assert call()[0][0] == "toy" and not launched


def test_a_veto_asks_again_and_records_nothing(launched):
    record()
    flash_attn.register_backend("second", object(), **{**SERVES, "before": "cpu"})
    (name, asked), _ = call(veto=[("toy", "not today")])
    assert name == "second" and not asked.recordable
    with pytest.raises(ValueError, match="not recordable"):
        asked.record([LAUNCH], 64)
    flash_attn.unregister_backend("second")


def test_the_first_recording_stays(launched):
    (_, first), _ = call()
    (_, second), _ = call()
    first.record([(7, 1, 32, 0, [])])
    second.record([(8, 1, 32, 0, [])])
    call()
    assert [function for function, *_ in launched] == [7]


def test_checks_come_first(launched):
    record()
    with pytest.raises(ValueError, match="overlap"):
        call(lambda t: {"out": t["q"]})
    assert not launched


def test_without_an_allocator_only_what_needs_none_is_launched(launched):
    def on_device(x):
        return OnDevice(x, CUDA)

    record(make=on_device)
    assert call(make=on_device)[0][0] == "toy" and not launched
    _C.forget_recordings()
    record([(7, 1, 32, 0, ["q"])], 0, make=on_device)
    assert call(make=on_device)[0] == "toy" and len(launched) == 1


def test_only_cuda_devices_are_recorded(launched):
    assert not call(make=lambda x: OnDevice(x, ROCM))[0][1].recordable
    flash_attn.register_backend("here", object(), **{**SERVES, "devices": ("cpu",)})
    assert not call(make=lambda x: x)[0][1].recordable
    flash_attn.unregister_backend("here")
    _C.launch_by(None)
    if not torch.cuda.is_available():
        assert not call()[0][1].recordable


def test_every_tensor_has_the_name_that_engines_know(launched):
    names = [name for name in dir(Tensors) if not name.startswith("_") and name != "mods"]  # which are no tensor
    record([(7, 1, 32, 0, names)])
    _, t = call()
    ((*_, values),) = launched
    addresses = {name: x.data_ptr() for name, x in t.items()}
    assert values == [addresses.get(name, 0) for name in names] and len(names) > 25


@pytest.mark.parametrize(
    "parameter, words",
    [("nothing", "name of a tensor"), (64, "within the workspace of 64"), (-1, "within the workspace"),
     (bytes(9), "at most 8 bytes")],
)  # fmt: skip
def test_malformed_recordings(launched, parameter, words):
    with pytest.raises(ValueError, match=words):
        record([(7, 1, 32, 0, [parameter])])
    assert _C.recordings() == 0 and call()[0][0] == "toy"


def test_errors_of_a_launch_reach_the_caller(launched):
    def fail(*launch):
        raise RuntimeError("the device is gone")

    _C.launch_by(fail)
    record()
    with pytest.raises(RuntimeError, match="the device is gone"):
        call()
    assert not OfFramework.live
