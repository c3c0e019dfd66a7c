"""Sources of packages: installed ones, and wheels that ./dev test --ecosystem downloads where a CPU cannot run them."""

from __future__ import annotations

import ast
import importlib.util
import os
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

WHEELS = Path(os.environ.get("FLASH_ATTN_ECOSYSTEM_WHEELS", Path(sys.prefix) / "wheels"))
OURS = ("flash_attn", "flash_attn_interface", "flash_attn_3", "flash_attn_config", "flash_attn_2_cuda")


def files(package: str) -> Iterator[tuple[str, str]]:
    """-> (path, text) of the Python files of an installed package, or of one in a wheel."""
    if spec := importlib.util.find_spec(package):
        for file in Path(spec.origin).parent.rglob("*.py"):
            yield str(file), file.read_text(encoding="utf-8", errors="replace")
        return
    with zipfile.ZipFile(wheel(package)) as archive:
        for name in archive.namelist():
            if name.endswith(".py"):
                yield name, archive.read(name).decode("utf-8", errors="replace")


def wheel(package: str) -> Path:
    found = sorted(WHEELS.glob(f"{package}-*.whl"))
    assert found, f"{package}: no wheel in {WHEELS}"
    return found[-1]


def text(package: str, path: str) -> str:
    """A file of a package in a wheel."""
    with zipfile.ZipFile(wheel(package)) as archive:
        return archive.read(path).decode("utf-8")


def imports(package: str) -> set[tuple[str, str]]:
    """-> (module, name) for every import of ours in a package, wherever it stands; name is "" for a module's own."""
    found = set()
    for _, source in files(package):
        if "flash_attn" not in source:
            continue
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and not node.level and _is_ours(node.module):
                found |= {(node.module, x.name) for x in node.names}
            elif isinstance(node, ast.Import):
                found |= {(x.name, "") for x in node.names if _is_ours(x.name)}
    return found


def _is_ours(module: str | None) -> bool:
    return module is not None and module.split(".")[0] in OURS
