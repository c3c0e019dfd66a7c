"""FLASH_ATTN_FULL=1 (or --full): the property test draws thousands of problems instead of hundreds."""

from __future__ import annotations

import os

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", default=os.environ.get("FLASH_ATTN_FULL", "0") not in ("", "0"))


def pytest_configure(config: pytest.Config) -> None:
    # The formula's operations are tiny: a second OpenMP team only gets in the way of the threads under test.
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
