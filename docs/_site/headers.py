"""The reference of the public headers: Doxygen reads them to XML, and this makes one page of it.

The headers say what a field is in plain comments behind it; a filter tells Doxygen that these belong to the field.
"""

from __future__ import annotations

import subprocess
import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path

INCLUDE = Path(__file__).resolve().parents[2] / "include" / "flash_attn"
HEADERS = {
    "flash_attn.hpp": "The C++ API",
    "tensor.hpp": "Tensors",
    "error.hpp": "Errors",
    "flash_attn.h": "The C API",
}
_SETTINGS = r"""
INPUT = {inputs}
OUTPUT_DIRECTORY = {out}
GENERATE_HTML = NO
GENERATE_LATEX = NO
GENERATE_XML = YES
XML_PROGRAMLISTING = NO
EXTRACT_ALL = YES
MARKDOWN_SUPPORT = NO
AUTOLINK_SUPPORT = NO
QUIET = YES
WARN_IF_UNDOCUMENTED = NO
WARN_AS_ERROR = YES
MACRO_EXPANSION = YES
EXPAND_ONLY_PREDEF = YES
PREDEFINED = FLASH_ATTN_API= __cplusplus
INPUT_FILTER = "sed -E -e 's#([;,]) +// #\1 ///< #' \
                       -e '/in C: the/!s#^( *)/[*] #\1/** #' -e 's#([;,0-9]) +/[*] #\1 /**< #'"
"""


def _text(element: ET.Element | None) -> str:
    """Words on one line; what stood between backticks comes as it was."""
    return " ".join("".join(element.itertext()).split()) if element is not None else ""


def _words(member: ET.Element) -> str:
    parts = (_text(member.find(tag)) for tag in ("briefdescription", "detaileddescription"))
    return " ".join(p for p in parts if p)


def _escaped(text: str) -> str:
    """As Markdown, for a cell of a table; what stands between backticks is code already."""
    outside = str.maketrans({"<": "&lt;", "*": "\\*", "_": "\\_"})
    parts = text.replace("|", "\\|").split("`")
    return "`".join(part if i % 2 else part.translate(outside) for i, part in enumerate(parts))


def _variables(members: list[ET.Element]) -> list[str]:
    lines = ["| Field | Type | Default | |", "|---|---|---|---|"]
    for m in members:
        default = _text(m.find("initializer")).removeprefix("=").strip()
        cells = (f"`{_text(m.find('name'))}`", f"`{_text(m.find('type'))}{_text(m.find('argsstring'))}`")
        shown = "" if default in ("", "{}") else f"`{default}`"
        lines.append(f"| {cells[0]} | {cells[1]} | {shown} | {_escaped(_words(m))} |".replace("||", "\\|\\|"))
    return lines


def _declaration(m: ET.Element) -> str:
    arguments = ", ".join(
        f"{_text(p.find('type'))} {_text(p.find('declname'))}".strip() + _text(p.find("array"))
        for p in m.findall("param")
    )
    if m.get("kind") == "function":
        return f"{_text(m.find('type'))} {_text(m.find('name'))}({arguments or _void(m)});"
    return _text(m.find("definition")) + ";"


def _void(m: ET.Element) -> str:
    return "void" if _text(m.find("argsstring")) == "(void)" else ""


def _block(m: ET.Element) -> list[str]:
    kind, name = m.get("kind"), _text(m.find("name"))
    if kind == "enum":
        values = [("`" + _text(v.find("name")) + "`", _words(v)) for v in m.findall("enumvalue")]
        rows = [f"| {value} | {_escaped(words)} |" for value, words in values]
        title = [f"### enum {name}", ""] if name and not name.startswith("@") else []
        return [*title, _escaped(_words(m)) or "Numbers:", "", "| Value | |", "|---|---|", *rows, ""]
    return [f"### {name}", "", "```cpp", _declaration(m), "```", "", _escaped(_words(m)), ""]


def _struct(compound: ET.Element) -> list[str]:
    name = _text(compound.find("compoundname")).removeprefix("flash_attn::")
    members = [m for m in compound.iter("memberdef") if m.get("prot") == "public"]
    fields = [m for m in members if m.get("kind") == "variable" and m.get("static") == "no"]
    functions = [m for m in members if m.get("kind") == "function"]
    lines = [f"### {compound.get('kind')} {name}", "", _escaped(_words(compound)), ""]
    if fields:
        lines += [*_variables(fields), ""]
    for m in functions:
        words = _words(m)
        lines += [f"- `{_declaration(m)}`" + (f" {_escaped(words)}" if words else "")]
    return [*lines, ""]


def _xml() -> list[ET.Element]:
    with tempfile.TemporaryDirectory() as folder:
        settings = Path(folder) / "Doxyfile"
        inputs = " ".join(str(INCLUDE / name) for name in HEADERS)
        settings.write_text(_SETTINGS.format(inputs=inputs, out=folder), encoding="utf-8")
        try:
            subprocess.run(["doxygen", settings], check=True, capture_output=True, text=True)
        except FileNotFoundError:
            raise RuntimeError("the page of the headers needs doxygen (apt-get install doxygen)") from None
        except subprocess.CalledProcessError as error:
            raise RuntimeError(f"doxygen: {error.stderr}") from None
        return [d for f in sorted(Path(folder, "xml").glob("*.xml")) for d in ET.parse(f).getroot().iter("compounddef")]


def _entries(compounds: list[ET.Element]) -> dict[str, list[tuple[int, list[str]]]]:
    """By header: every struct, function, enum and type, with the line where it stands."""
    found: dict[str, dict[int, list[str]]] = {name: {} for name in HEADERS}

    def add(element: ET.Element, lines: list[str]) -> None:
        at = element.find("location")
        found[Path(at.get("file")).name].setdefault(int(at.get("line")), lines)

    for compound in compounds:
        if compound.get("kind") in ("struct", "class"):
            add(compound, _struct(compound))
        elif compound.get("kind") in ("namespace", "file"):
            for m in compound.iter("memberdef"):
                of_struct = _text(m.find("definition")).startswith("typedef struct")  # the struct is there already
                if m.get("kind") in ("function", "enum", "typedef") and not of_struct:
                    add(m, _block(m))
    return {name: sorted(entries.items()) for name, entries in found.items()}


def page() -> str:
    lines = [
        "# C++ and C headers",
        "",
        "Made by Doxygen from `include/flash_attn/`. [The guide](cpp.md) shows how to build, link and call.",
        "",
    ]
    for name, entries in _entries(_xml()).items():
        lines += [f"## {HEADERS[name]}: `{name}`", ""]
        for _, block in entries:
            lines += block
    return "\n".join(lines)
