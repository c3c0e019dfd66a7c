"""The installed package: typed, with a stub of its native module, and without requirements of its own."""

import ast
from importlib import metadata
from pathlib import Path

import flash_attn
import pytest
from flash_attn import _C

FOLDER = Path(flash_attn.__file__).parent
ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(FOLDER.is_relative_to(ROOT / "python"), reason="runs from the sources, not installed")


def test_is_typed() -> None:
    assert (FOLDER / "py.typed").exists()


def test_stub_has_the_functions_of_the_native_module() -> None:
    tree = ast.parse((FOLDER / "_C.pyi").read_text(encoding="utf-8"))
    stubbed = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert stubbed == {name for name, value in vars(_C).items() if callable(value) and not name.startswith("_")}


def test_requires_nothing_unasked() -> None:
    requires = metadata.requires("flash-attention-plus") or []
    assert [r for r in requires if "extra ==" not in r] == []
    assert any(r.startswith("torch>=") and "'torch'" in r.replace('"', "'") for r in requires)
