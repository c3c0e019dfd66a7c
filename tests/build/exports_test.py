"""The shared library exports what the public headers declare, and nothing else.

usage: exports_test.py NM LIBRARY INCLUDE_FOLDER
       exports_test.py NM LIBRARY --only NAME       of ours nothing; of its own, this function
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

# A class whose type must be one in a process is exported with it; whether the compiler emits a vtable is its affair.
ERROR_PARTS = ("typeinfo for ", "typeinfo name for ", "vtable for ")


# At the start of a line, without a body. Members of classes are indented, and have bodies.
OTHERS = "inline|constexpr|template|typedef|using|class|struct|enum|namespace|extern"
DECLARATION = rf"^(?!{OTHERS})[A-Za-z_][^;{{}}()=]*?(\w+)\([^;{{}}]*\);"


def declared(include: Path) -> tuple[set[str], set[str], set[str]]:
    """Names of the functions that are declared without a body, those of them marked, and the classes marked."""
    functions, marked, classes = set(), set(), set()
    for header in sorted(include.rglob("*.h*")):
        text = re.sub(r"/\*.*?\*/|//[^\n]*", "", header.read_text(), flags=re.S)
        text = re.sub(r"^#(?:.*\\\n)*.*", "", text, flags=re.M)
        scope = "flash_attn::" if header.suffix == ".hpp" else ""
        classes |= {scope + name for name in re.findall(r"^(?:class|struct) FLASH_ATTN_API (\w+)", text, flags=re.M)}
        for match in re.finditer(DECLARATION, text, flags=re.M):
            functions.add(scope + match[1])
            if match[0].startswith("FLASH_ATTN_API "):
                marked.add(scope + match[1])
    return functions, marked, classes


def exported(library: str, nm: str) -> set[str]:
    lines = subprocess.run(
        [nm, "--dynamic", "--defined-only", "--demangle", library], check=True, capture_output=True, text=True
    ).stdout.splitlines()
    return {line.split(maxsplit=2)[2].split("@")[0] for line in lines}


def compare(symbols: set[str], include: Path) -> list[str]:
    functions, marked, classes = declared(include)
    if len(functions) < 20 or classes != {"flash_attn::Error"}:
        return [f"could not read the headers: {len(functions)} functions, classes {classes}"]
    names = {symbol.split("(")[0].split("[")[0] for symbol in symbols}
    allowed = {part + name for part in ERROR_PARTS for name in classes}
    return [
        *(f"declared without FLASH_ATTN_API: {name}" for name in sorted(functions - marked)),
        *(f"declared, not exported: {name}" for name in sorted(functions - names)),
        *(f"exported, not declared: {name}" for name in sorted(names - functions - allowed)),
    ]


def keeps_to(symbols: set[str], own: str) -> list[str]:
    # The type of Error goes along, so that what one library throws another one catches.
    ours = {s for s in symbols if "flash_attn" in s and not s.startswith(ERROR_PARTS)}
    return [f"exported: {symbol}" for symbol in sorted(ours)] + ([] if own in symbols else [f"not exported: {own}"])


def main(nm: str, library: str, *rest: str) -> int:
    symbols = exported(library, nm)
    faults = keeps_to(symbols, rest[1]) if rest[0] == "--only" else compare(symbols, Path(rest[0]))
    print(*faults, f"{library}: {len(symbols)} symbols, {len(faults)} faults", sep="\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
