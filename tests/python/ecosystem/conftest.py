"""Tests that need packages from PyPI which nothing else here needs: ./dev test --ecosystem installs them.

Without --ecosystem nothing in this folder is collected.
"""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    return True if not config.getoption("--ecosystem") else None
