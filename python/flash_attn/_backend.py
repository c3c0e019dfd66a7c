"""Which engine runs a call: the switch, the list of engines, and the answer to "why this one?"."""

from __future__ import annotations

import contextlib
import contextvars
import os
from collections.abc import Iterator
from typing import NamedTuple

from flash_attn import _C

_chosen: contextvars.ContextVar[str | None] = contextvars.ContextVar("flash_attn_backend", default=None)


def _refuse_flaggems() -> str:
    if (name := _chosen.get()) is None:
        raise NotImplementedError(
            "FLASH_ATTENTION_USE_FLAGGEMS: this version has no FlagGems backend; unset the variable, or choose among "
            f"{', '.join(b.name for b in backends())} with FLASH_ATTENTION_BACKEND or flash_attn.backend()"
        )
    return name


# FLASH_ATTENTION_BACKEND is read by the core. The older FLASH_ATTENTION_USE_FLAGGEMS is never silently ignored.
_asks_for_flaggems = os.environ.get("FLASH_ATTENTION_USE_FLAGGEMS", "0").lower() not in ("", "0", "false", "off", "no")
current = _refuse_flaggems if _asks_for_flaggems and not os.environ.get("FLASH_ATTENTION_BACKEND") else _chosen.get


@contextlib.contextmanager
def backend(name: str | None) -> Iterator[None]:
    """Within the block, calls run on the backend of this name (None: the automatic choice), or fail.

    A backward pass runs where its forward ran. Under torch.compile the switch counts when the compiled code runs.
    """
    if name is not None and name not in (known := [b.name for b in backends()]):
        raise ValueError(f"backend: expected one of {', '.join(known)}, got {name!r}")
    token = _chosen.set(name)
    try:
        yield
    finally:
        _chosen.reset(token)


class Backend(NamedTuple):
    name: str
    description: str
    unavailable: str  # why this machine cannot use it; empty if it can


def backends() -> list[Backend]:
    """Every backend that this build knows, the preferred first."""
    return [Backend(*b) for b in _C.backends()]
