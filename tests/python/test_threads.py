"""The kernels run on torch's threads: their number follows torch's, results do not depend on it, forks work."""

import os

import flash_attn
import pytest
import torch
from flash_attn import flash_attn_func


@pytest.fixture(autouse=True)
def restore_threads():
    before = torch.get_num_threads()
    yield
    flash_attn.set_num_threads(0)
    torch.set_num_threads(before)


def attend(seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    q, k, v = (torch.randn(2, 300, 3, 40) for _ in range(3))
    return flash_attn_func(q, k, v, causal=True)


def test_torchs_number_of_threads_counts():
    torch.set_num_threads(3)
    assert flash_attn.num_threads() == 3
    torch.set_num_threads(1)
    assert flash_attn.num_threads() == 1


def test_our_own_number_wins_until_it_is_taken_back():
    flash_attn.set_num_threads(2)
    torch.set_num_threads(5)
    assert flash_attn.num_threads() == 2
    flash_attn.set_num_threads(0)
    torch.set_num_threads(4)
    assert flash_attn.num_threads() == 4


def test_results_do_not_depend_on_threads():
    torch.set_num_threads(1)
    one = attend()
    for n in (2, 3, 8):
        torch.set_num_threads(n)
        assert torch.equal(attend(), one)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
def test_a_forked_child_attends():
    q, k, v = (torch.randn(2, 300, 3, 40) for _ in range(3))  # here: torch's own operators may hang in a child
    want = flash_attn_func(q, k, v)
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        same = flash_attn_func(q, k, v).numpy().tobytes() == want.numpy().tobytes()
        os.write(writer, b"y" if same else b"n")
        os._exit(0)
    assert os.read(reader, 1) == b"y"
    os.waitpid(child, 0)
