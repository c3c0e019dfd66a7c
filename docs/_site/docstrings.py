"""How docstrings become pages: this project writes them for `help()`, in plain lines, and Markdown would join them.

A line `name: words` or `name   words`, with its continuation further to the right, becomes an item of a list. All else
keeps the underscores and stars that Markdown would eat.
"""

from __future__ import annotations

import re

import griffe

# "q, k: words", "softmax_scale: words", "return_attn_probs: -> out", "devices     torch's names"
_ITEM = re.compile(r"^(?P<name>[a-z_][\w=(), ]*?)(?::\s+|\s{2,})(?P<words>\S.*)$")


def markdown(text: str) -> str:
    lines, inside = [], False
    for line in text.splitlines():
        item = _ITEM.match(line)
        if item and not line.startswith(("see ", "shapes are")):
            if not inside:
                lines.append("")
            lines.append(f"- `{item['name'].strip()}`: {_safe(item['words'])}")
            inside = True
        elif inside and line.startswith("    "):
            lines.append("    " + _safe(line.strip()))
        else:
            if inside and line.strip():
                lines.append("")
            inside = inside and not line.strip()
            lines.append(_safe(line) if not line.startswith("    ") else line)
    return "\n".join(lines)


def _safe(text: str) -> str:
    return re.sub(r"([*_<|])", r"\\\1", text) if "`" not in text else text


class PlainDocstrings(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_) -> None:
        if obj.docstring and not obj.docstring.value.startswith("#"):
            obj.docstring.value = markdown(obj.docstring.value)
