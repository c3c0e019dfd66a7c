"""What the site has beyond the pages of docs/: the root's documents, plots and tables of the data, the headers.

mkdocs calls `on_config` (`hooks:` in mkdocs.yml). The pages are put together in build/docs-source; nothing made is
committed.
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

from mkdocs.plugins import event_priority
from pymdownx.slugs import slugify

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE))
import headers  # noqa: E402
import plots  # noqa: E402
import tables  # noqa: E402

# Documents that stand outside of docs/, where people and GitHub look for them, and their pages.
OUTSIDE = {
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
    "LICENSE": "license.md",
    "benchmarks/README.md": "benchmarks.md",
    "benchmarks/results/README.md": "results.md",
}


def _target(link: str, folder: Path, page: str) -> str:
    """A link relative to `folder` of the repository, as one relative to `page` of the site; others are kept."""
    path, mark, anchor = link.partition("#")
    if not path or "://" in path:
        return link
    try:
        target = (folder / path).resolve().relative_to(ROOT).as_posix()
    except ValueError:
        return link
    if target in OUTSIDE:
        target = OUTSIDE[target]
    elif target.startswith("docs/"):
        target = target.removeprefix("docs/")
    else:
        return link
    return "../" * page.count("/") + target + mark + anchor


def _relink(text: str, folder: Path, page: str) -> str:
    """Links of Markdown text; those to files that the site does not have become plain words."""

    def replaced(match: re.Match) -> str:
        words, link = match[1], match[2]
        new = _target(link, folder, page)
        leads_out = new == link and "://" not in link and not link.startswith("#") and (folder / link).exists()
        return words if leads_out and (ROOT / "docs") not in (folder / link).resolve().parents else f"[{words}]({new})"

    return re.sub(r"\[([^\]]*)\]\(([^)\s]+)\)", replaced, text)


def _filled(text: str, page: str) -> str:
    """`<!-- plot: NAME -->` and `<!-- table: NAME -->` become what their names say, plots in light and in dark."""
    up = "../" * page.count("/")

    def plot(match: re.Match) -> str:
        alt = plots.PLOTS[match[1]].__doc__.strip()
        return "\n".join(f"![{alt}]({up}plots/{match[1]}-{mode}.svg#only-{mode})" for mode in ("light", "dark"))

    text = re.sub(r"<!-- plot: ([\w-]+) -->", plot, text)
    return re.sub(r"<!-- table: ([\w-]+) -->", lambda m: tables.TABLES[m[1]](), text)


_HEADING = re.compile(r"^#+ .+$", re.M)


def _anchored(text: str, english: str) -> str:
    """A translation whose headings have the ids of the English ones, so that a link leads to either."""
    slug = slugify(case="lower")
    plain = (re.sub(r"[`*]|^#+ ", "", heading) for heading in _HEADING.findall(_outside_blocks(english)))
    ids = iter([slug(heading, "-") for heading in plain])
    inside = False
    lines = []
    for line in text.splitlines():
        inside ^= line.startswith("```")
        lines.append(f"{line} {{ #{next(ids)} }}" if not inside and _HEADING.match(line) else line)
    return "\n".join(lines) + "\n"


def _outside_blocks(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)


def stage(docs: Path) -> None:
    """The source of the site: docs/ as it is, with links, plots and tables filled in, and the pages from elsewhere."""
    shutil.rmtree(docs, ignore_errors=True)
    shutil.copytree(ROOT / "docs", docs, ignore=shutil.ignore_patterns("_site", "*.py", "requirements.txt"))
    for file in docs.rglob("*.md"):
        page = file.relative_to(docs)
        text = _filled(file.read_text(encoding="utf-8"), page.as_posix())
        if file.name.endswith(".zh.md"):
            text = _anchored(
                text, (ROOT / "docs" / page).with_suffix("").with_suffix(".md").read_text(encoding="utf-8")
            )
        file.write_text(_relink(text, ROOT / "docs" / page.parent, page.as_posix()), encoding="utf-8")
    for path, page in OUTSIDE.items():
        text = (ROOT / path).read_text(encoding="utf-8")
        if path == "LICENSE":
            text = f"# Licence\n\n```text\n{text}```\n"
        (docs / page).write_text(_relink(text, (ROOT / path).parent, page), encoding="utf-8")
    (docs / "plots").mkdir()
    for name, image in plots.images().items():
        (docs / "plots" / name).write_bytes(image)
    (docs / "api-cpp.md").write_text(headers.page(), encoding="utf-8")


@event_priority(100)  # before the plugin of languages looks
def on_config(config):
    docs = ROOT / "build" / "docs-source"
    stage(docs)
    config.docs_dir = str(docs)
    return config
