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
    for kind, is_one in ((ast.FunctionDef, callable), (ast.ClassDef, lambda value: isinstance(value, type))):
        stubbed = {node.name for node in tree.body if isinstance(node, kind)}
        real = {n: value for n, value in vars(_C).items() if is_one(value) and not n.startswith("_")}
        classes = {n for n, value in real.items() if isinstance(value, type)}
        assert stubbed == (classes if kind is ast.ClassDef else set(real) - classes)


def test_requires_nothing_unasked() -> None:
    requires = metadata.requires("flash-attention-plus") or []
    assert [r for r in requires if "extra ==" not in r] == []
    assert any(r.startswith("torch>=") and "'torch'" in r.replace('"', "'") for r in requires)
