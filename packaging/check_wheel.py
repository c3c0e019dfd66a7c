"""Tries a wheel as a stranger would: an empty environment, the wheel and NumPy, and the README's examples of those.

python packaging/check_wheel.py WHEEL     makes the environment, installs, and runs
python packaging/check_wheel.py --here    runs in this interpreter's environment (cibuildwheel has made one)

An example counts if it imports nothing that is not there: in an environment without PyTorch those for NumPy.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

README = Path(__file__).resolve().parents[1] / "README.md"


def imports(program: str) -> set[str]:
    """The packages that a program imports."""
    found = set()
    for node in ast.walk(ast.parse(program)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


def examples() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", README.read_text(encoding="utf-8"), re.M | re.S)


def run_examples() -> None:
    blocks = examples()
    chosen = [b for b in blocks if all(importlib.util.find_spec(name) for name in imports(b))]
    if not chosen:
        sys.exit(f"check_wheel: {README.name} has no example that this environment can run")
    for block in chosen:
        exec(compile(block, README.name, "exec"), {"__name__": "__main__"})
    import flash_attn

    print(f"{len(chosen)} of {len(blocks)} examples of {README.name} ran on {flash_attn.__file__}")


def in_empty_environment(wheel: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = Path(folder, "bin", "python")
        subprocess.run([python, "-m", "pip", "install", "--quiet", wheel, "numpy"], check=True)
        subprocess.run([python, "-I", Path(__file__).resolve(), "--here"], check=True, cwd=folder)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    run_examples() if sys.argv[1] == "--here" else in_empty_environment(Path(sys.argv[1]).resolve())
