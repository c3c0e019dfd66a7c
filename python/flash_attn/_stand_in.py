"""flash_attn.cute where FlashAttention-4 is not installed.

The distribution flash-attn-4 puts its files into flash_attn/cute. Ours lie elsewhere, so that neither overwrites the
other, and are found last: where an installed flash_attn.cute can be found, it is the one that is imported.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

NAME = "flash_attn.cute"
FOLDER = Path(__file__).with_name("_cute")


class StandIn:
    """The last of sys.meta_path."""

    name = NAME

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != NAME:
            return None
        return importlib.util.spec_from_file_location(
            NAME, FOLDER / "__init__.py", submodule_search_locations=[str(FOLDER)]
        )


def install() -> None:
    if not any(getattr(finder, "name", None) == NAME for finder in sys.meta_path):
        sys.meta_path.append(StandIn)
