"""Continuous integration runs what ./dev runs: a step that is no ./dev command is one that nobody tried."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
DEV = (ROOT / "dev").read_text(encoding="utf-8")


def jobs(path: Path) -> dict[str, dict]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"]


def commands(job: dict) -> list[str]:
    """What a job runs, once for each value of its matrix."""
    runs = [step["run"] for step in job.get("steps", ()) if "run" in step]
    found = []
    for run in runs:
        name = re.search(r"\$\{\{ matrix\.(\w+) \}\}", run)
        values = job["strategy"]["matrix"][name[1]] if name else [None]
        found += [run if value is None else run.replace(name[0], value) for value in values]
    return found


def test_there_are_workflows() -> None:
    expected = {"test", "docs", "sanitizers", "ecosystem", "wheels", "release"}
    assert {p.stem for p in WORKFLOWS} >= expected


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.stem)
def test_jobs_run_dev(path: Path) -> None:
    known = set(re.findall(r"^  (\w+)(?:\)| \|)", DEV, re.M))
    for job in jobs(path).values():
        for command in commands(job):
            program, name, *options = command.split()
            assert program == "./dev" and name in known, command
            for option in (o for o in options if o.startswith("--")):
                assert re.search(rf"{option}\b", DEV.split("HELP\n}", 1)[1]), f"{command}: dev knows no {option}"


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.stem)
def test_jobs_have_limits(path: Path) -> None:
    workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert workflow["permissions"] == {"contents": "read"}  # a job that needs more says so itself
    for name, job in workflow["jobs"].items():
        assert "uses" in job or "timeout-minutes" in job, name
        for step in job.get("steps", ()):
            if step.get("uses", "").startswith("actions/checkout@"):
                assert step["with"]["persist-credentials"] is False, name


# What bash 3.2 (macOS has no newer one) or the tools of macOS lack.
UNPORTABLE = {
    r"@\(|\+\(|!\([^(]": "extended patterns need a shopt that newer ones do without",
    r"\b(mapfile|readarray|coproc)\b|(declare|local|readonly) -[a-z]*[An]": "bash 4",
    r"\$\{\w+(,,?|\^\^?|@\w)\}|&>>|\|&|;&": "bash 4",
    r"\b(sha256sum|nproc|readlink -f|realpath|sed -i|date -d|stat -c|timeout|flock|tac|xargs (-r|--no))\b": "Linux's",
    r"\bpaste (?!.* -;)": "BSD's paste reads no input unasked",
}


@pytest.mark.parametrize("pattern", UNPORTABLE)
def test_dev_runs_on_macos(pattern: str) -> None:
    """No Mac was at hand to try it on; this is what can be seen without one."""
    code = [x for x in DEV.split("\nHELP\n")[1].splitlines() if not x.lstrip().startswith("#")]
    assert len(code) > 300
    lines = [x for x in code if re.search(pattern, x) and not x.startswith("sha256() {")]
    assert not lines, UNPORTABLE[pattern]
