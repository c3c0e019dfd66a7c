"""Options beyond pytest's own.

--full           (or FLASH_ATTN_FULL=1) the property test draws thousands of problems instead of hundreds
--device cuda    suites marked with `device` run there, and the others, which are about the CPU, not at all
--backend NAME   those suites run on this backend, where it serves the call; default: the automatic choice
--ecosystem      also the tests of tests/python/ecosystem, which need more packages: ./dev test --ecosystem
"""

from __future__ import annotations

import os

import flash_attn
import pytest
import torch
from support import device as under_test

# Folders of tests that make their tensors on the device, where their formulas run too; all others move them there.
MADE_THERE = {"cute", "integrations", "layers", "modules"}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", default=os.environ.get("FLASH_ATTN_FULL", "0") not in ("", "0"))
    parser.addoption("--device", default="cpu", help="run the suites of all devices there (default: cpu)")
    parser.addoption("--ecosystem", action="store_true", help="also the tests of tests/python/ecosystem")
    parser.addoption("--backend", default=None, help="run those suites on this backend (default: automatic)")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "device: runs on the device that --device names")
    under_test.configure(config.getoption("--device"), config.getoption("--backend"))
    # The formula's operations are tiny: a second OpenMP team only gets in the way of the threads under test.
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if under_test.DEVICE != "cpu" or under_test.BACKEND is not None:
        for item in items:
            if item.get_closest_marker("device") is None:
                item.add_marker(pytest.mark.skip(reason="about the CPU, or about no device"))


def made_there(node: pytest.Item | pytest.Collector) -> bool:
    return node.path.parent.name in MADE_THERE


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector):
    """Tensors of a module are made when it is imported."""
    with under_test.default_device(isinstance(collector, pytest.Module) and made_there(collector)):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item):
    """And so are those of fixtures and tests."""
    with under_test.default_device(made_there(item)):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function):
    """A backend that was asked for by name may refuse, in words; the automatic choice must serve."""
    try:
        return (yield)
    except flash_attn.NotServed as e:
        if under_test.BACKEND is None:
            raise
        pytest.skip(f"refused: {e}")


@pytest.fixture
def device() -> str:
    """The device under test."""
    return under_test.DEVICE


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _under_test(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """The backend of --backend; and on another device dropout masks of the CPU's generator, as on the oracle."""
    if request.node.get_closest_marker("device") is None:
        yield
        return
    if under_test.DEVICE != "cpu" and not made_there(request.node):
        draw = flash_attn._attention.draw_rng_state
        monkeypatch.setattr(
            flash_attn._attention, "draw_rng_state", lambda q: draw(q.new_empty(0, device="cpu")).to(q.device)
        )
    with flash_attn.use_backend(under_test.BACKEND):
        yield
