"""The documents: what they print runs as printed, links lead somewhere, figures are those of the data.

A block that is not whole is marked by a comment before it: <!-- fragment: why -->
C and C++ blocks are linked against build/release (`./dev build`); a block without main() is called by a driver below.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/**/*.md")])
WIDEST = 160
LANGUAGES = ("python", "cpp", "c")

# What calls the functions of a block: the text that names the block, and a program.
DRIVERS = {
    "void attend(const float* q": """
        int main() {
          float q[8 * 8 * 64] = {}, k[8 * 2 * 64] = {}, v[8 * 2 * 64], out[8 * 8 * 64] = {}, lse[8 * 8] = {};
          for (float& x : v) x = 3;
          attend(q, k, v, out, lse);
          for (float x : out) if (x < 2.999f || x > 3.001f) return 1;  // a mean of threes
          return lse[0] == 0 && lse[2] > 1.098f && lse[2] < 1.099f ? 0 : 2;  // log 1, log 3
        }""",
    "void decode(const Model& m": """
        int main() {
          const Model m{4, 2, 16, 8, 32};
          uint16_t pages[2][6 * 4 * 2 * 16] = {}, q[2 * 4 * 16] = {}, out[2 * 4 * 16] = {};
          uint16_t k[2 * 2 * 16] = {}, v[2 * 2 * 16];
          for (uint16_t& x : v) x = 0x4080;  // 4 in bf16
          const int32_t table[2 * 3] = {5, 1, 0, 2, 4, 3};
          int32_t lengths[2] = {0, 7};
          const float cos[32 * 4] = {}, sin[32 * 4] = {};
          const Cache c{pages[0], pages[1], 6, 4, 3, table, lengths};
          decode(m, c, 2, q, k, v, out, cos, sin);
          if (lengths[0] != 1 || lengths[1] != 8) return 1;
          if (pages[1][5 * 4 * 2 * 16] != 0x4080 || pages[1][(4 * 4 + 3) * 2 * 16] != 0x4080) return 2;  // written
          return out[0] == 0x4080 && out[4 * 16] == 0x3f00 ? 0 : 3;  // 4 of one key, 4 / 8 of eight
        }""",
    "void lend(Pool& pool)": """
        #include <atomic>
        struct Pool {
          std::atomic<int64_t> tasks{0};
          void run(int64_t n, const std::function<void(int64_t)>& task) {
            for (int64_t i = 0; i < n; ++i) task(i), ++tasks;
          }
        };
        int main() {
          Pool pool;
          lend(pool);
          std::vector<float> x(64 * 4 * 64), out(x);
          const auto t = [](auto& y) { return flash_attn::view(y.data(), {1, 64, 4, 64}); };
          flash_attn::set_num_threads(2);
          flash_attn::forward({.q = t(x), .k = t(x), .v = t(x), .out = t(out)});
          return pool.tasks > 0 ? 0 : 1;
        }""",
    "int attend(const float* q": """
        int main(void) {
          static float q[5 * 8 * 64], k[5 * 8 * 64], v[5 * 8 * 64], out[5 * 8 * 64];
          for (int i = 0; i < 5 * 8 * 64; ++i) v[i] = 2;
          if (attend(q, k, v, out, 5) != 0 || attend(q, k, v, q, 5) == 0) return 1;  /* out may not be q */
          for (int i = 0; i < 5 * 8 * 64; ++i) if (out[i] < 1.999f || out[i] > 2.001f) return 2;
          return 0;
        }""",
}


@dataclass(frozen=True)
class Block:
    place: str  # docs/cpp.md:66
    language: str
    text: str
    fragment: bool


def blocks() -> list[Block]:
    found: dict[str, Block] = {}
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        for match in re.finditer(r"^(<!-- fragment: .+ -->\n)?```(\w+)\n(.*?)^```$", text, re.M | re.S):
            line = text.count("\n", 0, match.start(2)) + 1
            block = Block(f"{path.relative_to(ROOT)}:{line}", match[2], match[3], bool(match[1]))
            if block.language in LANGUAGES and not block.fragment:
                found.setdefault(block.text, block)  # a translation has the same blocks
    return list(found.values())


BLOCKS = blocks()


def of(*languages: str) -> list[pytest.ParameterSet]:
    return [pytest.param(block, id=block.place) for block in BLOCKS if block.language in languages]


@pytest.mark.parametrize("block", of("python"))
def test_python_block(block: Block) -> None:
    exec(compile(block.text, block.place, "exec"), {"__name__": "__main__"})


def compiler(language: str) -> list[str]:
    names = {"cpp": (os.environ.get("CXX"), "c++", "g++", "clang++"), "c": (os.environ.get("CC"), "cc", "gcc", "clang")}
    for name in names[language]:
        if name and shutil.which(name):
            return [name, "-x", "c++", "-std=c++20"] if language == "cpp" else [name, "-x", "c", "-std=c99"]
    pytest.skip(f"no compiler for {language}")


@pytest.mark.parametrize("block", of("cpp", "c"))
def test_compiled_block(block: Block, tmp_path: Path) -> None:
    program = block.text
    if "int main(" not in program:
        drivers = [driver for key, driver in DRIVERS.items() if key in program]
        assert len(drivers) == 1, f"{block.place}: needs a driver in DRIVERS, or the mark of a fragment"
        program += drivers[0]
    source, objects = tmp_path / "block.txt", tmp_path / "block.o"
    source.write_text(program, encoding="utf-8")
    strict = ["-Wall", "-Wextra", "-Wpedantic", "-Werror", f"-I{ROOT / 'include'}"]
    subprocess.run([*compiler(block.language), *strict, "-c", source, "-o", objects], check=True)
    library = ROOT / "build/release/libflash_attn.a"
    if not library.exists():
        pytest.skip("compiled; to run it, ./dev build first")
    link = [compiler("cpp")[0], objects, library, "-pthread", "-o", tmp_path / "block"]
    subprocess.run(link, check=True)
    subprocess.run([tmp_path / "block"], check=True, timeout=60)


def test_every_language_is_met() -> None:
    assert {block.language for block in BLOCKS} == set(LANGUAGES)
    assert len(BLOCKS) >= 7  # as many as there were when this was written: the pattern still finds them


@pytest.mark.parametrize("path", [pytest.param(p, id=str(p.relative_to(ROOT))) for p in DOCUMENTS])
def test_lines_are_short(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    wide = [f"{i}: {len(x)}" for i, x in enumerate(lines, 1) if len(x) > WIDEST and not x.lstrip().startswith("|")]
    assert not wide


@pytest.mark.parametrize("path", [pytest.param(p, id=str(p.relative_to(ROOT))) for p in DOCUMENTS])
def test_links_lead_somewhere(path: Path) -> None:
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    targets = re.findall(r"\]\(([^)#\s]+)", text)
    made = {"docs/api-cpp.md"}  # when the site is built
    dead = [
        t
        for t in targets
        if "://" not in t and not (path.parent / t).exists() and f"{path.parent.name}/{t}" not in made
    ]
    assert not dead


@pytest.mark.parametrize("path", [pytest.param(p, id=str(p.relative_to(ROOT))) for p in DOCUMENTS])
def test_commands_exist(path: Path) -> None:
    dev = set(re.findall(r"^  (\w+)(?:\)| \|)", (ROOT / "dev").read_text(), re.M))
    assert "test" in dev
    assert set(re.findall(r"\./dev (\w+)", path.read_text(encoding="utf-8"))) <= dev
    programs = re.findall(r"(?<![\w/])((?:examples|benchmarks)/[\w/.]*\w)", path.read_text(encoding="utf-8"))
    assert not [p for p in programs if not (ROOT / p).exists()]


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("README.md", r"costs (\d+) to (\d+) µs besides arithmetic, `import flash_attn` (\d+) to (\d+) ms"),
        ("README_CN.md", r"耗时 (\d+) 至 (\d+) µs，`import flash_attn` 在 `import torch` 之外耗时 (\d+) 至 (\d+) ms"),
    ],
    ids=["README.md", "README_CN.md"],
)
def test_overhead_is_that_of_the_data(name: str, pattern: str) -> None:
    data = [json.loads(p.read_text()) for p in (ROOT / "benchmarks/results").glob("*/overhead.json")]
    expected = [f(d[key] for d in data) for key in ("flash_attn_func_us", "import_ms") for f in (min, max)]
    printed = re.search(pattern, (ROOT / name).read_text(encoding="utf-8"))
    assert printed and [int(x) for x in printed.groups()] == [round(x) for x in expected]


@pytest.mark.parametrize("name", ["README.md", "README_CN.md"])
def test_speed_on_a_gpu_is_that_of_the_data(name: str, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs/_site"))
    tables = importlib.import_module("tables")
    words = (ROOT / name).read_text(encoding="utf-8")
    found = [re.findall(r"[\d.]+ × \([\d.]+\)", line) for line in tables.gpu().splitlines()[2:]]
    assert len(found) == 2 and all(len(cells) == 2 and " | ".join(cells) in words for cells in found)


def test_the_feature_table_is_current() -> None:
    sys.path.insert(0, str(ROOT / "docs"))
    import feature_table

    table = feature_table.table()
    for page in feature_table.PAGES:
        assert page.read_text(encoding="utf-8") == feature_table.page_with(page, table), page.name


def sources() -> str:
    """All that may hold a message, with literals that stand one after the other joined as compilers join them."""
    folders = ("python/flash_attn", "python/bindings", "src")
    files = [f for folder in folders for f in sorted((ROOT / folder).rglob("*")) if f.suffix in (".py", ".cpp", ".hpp")]
    text = "\n".join(f.read_text(encoding="utf-8") for f in files)
    return re.sub(r'"\s*\n\s*f?"', "", text)


def test_messages_of_troubleshooting_exist() -> None:
    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    messages = re.findall(r"^### `(.+)`$", page, re.M)
    assert len(messages) >= 20 and len(messages) == page.count("\n### ")
    known = sources()

    def is_there(message: str) -> bool:
        parts = re.split(r" ?… ?|(?<=expected) ", message)
        return all(part in known for part in parts) and max(map(len, parts)) > 5

    dtypes = r"\b(?:float|int)\d+\b"  # written by name_of
    assert not [m for m in messages if not is_there(m) and not is_there(re.sub(dtypes, "…", m))]


def test_every_entry_of_the_performance_log_is_there_once() -> None:
    pages = sorted((ROOT / "docs/performance").glob("*.md"))
    tables = [t for p in pages for t in re.findall(r"^\| # \|.*\n(?:\|.*\n)+", p.read_text(encoding="utf-8"), re.M)]
    numbers = [int(n) for table in tables for n in re.findall(r"^\| (\d+) \|", table, re.M)]
    assert len(numbers) >= 47 and sorted(numbers) == list(range(1, len(numbers) + 1))


def test_translations_keep_up() -> None:
    """A page in Chinese has the sections of its English one, and the same blocks of Python."""
    pages = sorted((ROOT / "docs").glob("*.zh.md"))
    assert {p.name for p in pages} >= {
        f"{n}.zh.md" for n in ("index", "start", "installation", "migration", "api", "differences", "backends")
    }
    for page in pages:
        english = page.with_name(page.name.replace(".zh.md", ".md")).read_text(encoding="utf-8")
        chinese = page.read_text(encoding="utf-8")
        for pattern in (r"^(#+) ", r"^(```\w*)$", r"^(<!-- .* -->)$", r"^(\|)"):  # sections, blocks, rows
            assert re.findall(pattern, chinese, re.M) == re.findall(pattern, english, re.M), page.name
