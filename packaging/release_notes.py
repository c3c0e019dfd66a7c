"""The changelog's section of the version in CMakeLists.txt.

python packaging/release_notes.py [TAG]    a TAG, v0.1.0 say, must be that version, and the section must have a date
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def notes(tag: str | None) -> str:
    version = re.search(r"project\(FlashAttnPlus VERSION ([\d.]+)", (ROOT / "CMakeLists.txt").read_text())[1]
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    section = re.search(rf"^## {re.escape(version)} \(([^)\n]+)\)\n(.*?)(?=^## |\Z)", changelog, re.M | re.S)
    if section is None:
        raise SystemExit(f"release: CHANGELOG.md has no section '## {version} (DATE)'")
    if tag is not None and tag != f"v{version}":
        raise SystemExit(f"release: CMakeLists.txt says {version}, so the tag is v{version}, not {tag}")
    if tag is not None and not re.fullmatch(r"\d{4}-\d{2}-\d{2}", section[1]):
        raise SystemExit(f"release: CHANGELOG.md says '{version} ({section[1]})': a release has a date, 2026-01-31")
    return section[2].strip() + "\n"


if __name__ == "__main__":
    print(notes(sys.argv[1] if len(sys.argv) > 1 else None), end="")
