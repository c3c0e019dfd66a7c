"""What is known of releases of FlagGems. What is not known is found out at first use."""

from __future__ import annotations

import re
from typing import NamedTuple


class Measured(NamedTuple):
    """Calls that were right in a comparison with the formula in float64, `out` alone."""

    dtypes: tuple[str, ...]
    headdims: tuple[int, ...]
    masks: tuple[str, ...]
    page_sizes: tuple[int, ...]  # 0: no pages


# By release, Triton and vendor. One feature at a time: nobody has measured softcap together with ALiBi. On one H200:
# pairs of lengths from (1, 200) to (257, 257), shuffled pages. Not lse: with one query and grouped heads it comes
# back in another order of heads (see adapter.forward), and rows that see nothing were not looked at by themselves.
MEASURED = {
    ("5.0.2", "3.6", "nvidia"): Measured(("bfloat16",), (64, 80, 128), ("none", "causal", "window"), (0, 16)),
}

# The first Triton in which a release cannot be compiled.
TRITON_BEFORE = {"5.0.2": "3.9"}


def release(version: str) -> tuple[int, int]:
    """Major and minor: "3.6.0+metax" -> (3, 6)."""
    numbers = [int(n) for n in re.findall(r"\d+", version)[:2]]
    return (*numbers, 0, 0)[:2]


def is_measured(version: str, triton: str, vendor: str, s) -> bool:
    """`s`: a verification.Signature."""
    known = MEASURED.get((version, "{}.{}".format(*release(triton)), vendor))
    return (
        known is not None
        and s.dtype in known.dtypes
        and s.headdim in known.headdims
        and s.mask in known.masks
        and s.page_size in known.page_sizes
        and s.keys != "cache"
        and not (s.lse or s.blind)
        and (s.mask != "none") + s.softcap + s.alibi <= 1
    )
