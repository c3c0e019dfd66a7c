"""Small programs that people run: submitting a machine's benchmarks, what a release says, trying a wheel."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
WRITES = "import sys; open(sys.argv[sys.argv.index('--json') + 1], 'w').write('[]')"


def load(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def submit(monkeypatch, tmp_path):
    """submit(name) -> the folder; the benchmarks are two programs that write nothing but a file."""
    module = load("benchmarks/submit.py")
    programs = {name: [sys.executable, "-c", WRITES] for name in ("limit", "peers")}
    monkeypatch.setattr(module, "programs", lambda quick, gpu: programs)
    monkeypatch.setattr(module, "machine", lambda: {"commit": "0123456789ab"})

    def run(name: str) -> Path:
        monkeypatch.setattr(sys, "argv", ["submit.py", name, "--results", str(tmp_path)])
        module.main()
        return tmp_path / name

    return run


def test_a_submission_is_a_folder_of_records(submit) -> None:
    folder = submit("some-machine-2vcpu")
    assert sorted(p.name for p in folder.iterdir()) == ["limit.json", "machine.json", "peers.json"]
    about = json.loads((folder / "machine.json").read_text())
    assert about["commit"] == "0123456789ab" and not about["quick"] and about["load_before"] >= 0


@pytest.mark.parametrize("name", ["Some Machine", "../elsewhere", "-x", ""])
def test_a_submission_needs_a_name(submit, name: str) -> None:
    with pytest.raises(SystemExit):
        submit(name)


def test_a_submission_replaces_nothing(submit) -> None:
    submit("some-machine")
    with pytest.raises(SystemExit):
        submit("some-machine")


CHANGELOG = "# Changelog\n\n## 0.2.0 (2027-01-31)\n\nNew.\n\n- One.\n\n## 0.1.0 (unreleased)\n\nOld.\n"


@pytest.fixture
def notes(monkeypatch, tmp_path):
    """notes(version, tag) with a changelog of two versions."""
    module = load("packaging/release_notes.py")
    monkeypatch.setattr(module, "ROOT", tmp_path)
    (tmp_path / "CHANGELOG.md").write_text(CHANGELOG)

    def run(version: str, tag: str | None = None) -> str:
        (tmp_path / "CMakeLists.txt").write_text(f"project(FlashAttnPlus VERSION {version} LANGUAGES CXX)\n")
        return module.notes(tag)

    return run


def test_a_release_says_its_own_section(notes) -> None:
    assert notes("0.2.0", "v0.2.0") == "New.\n\n- One.\n"
    assert notes("0.1.0") == "Old.\n"


@pytest.mark.parametrize(
    ("version", "tag", "word"),
    [("0.2.0", "v0.1.0", "the tag is v0.2.0"), ("0.1.0", "v0.1.0", "has a date"), ("0.3.0", None, "no section")],
)
def test_a_release_that_contradicts_itself_is_refused(notes, version: str, tag: str | None, word: str) -> None:
    with pytest.raises(SystemExit, match=word):
        notes(version, tag)


def test_the_readme_has_an_example_without_torch() -> None:
    module = load("packaging/check_wheel.py")
    assert module.imports("import a.b as c\nfrom d.e import f\nif x:\n    import g") == {"a", "d", "g"}
    assert {"flash_attn", "numpy"} in map(module.imports, module.examples())
