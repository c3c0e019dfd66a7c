"""Which engine runs a call: the switch, the list of engines, and how to add one."""

from __future__ import annotations

import contextlib
import contextvars
import importlib.util
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from flash_attn import _C, _engines
from flash_attn._engines.builtin import BUILT_IN
from flash_attn._errors import InvalidArgument, NotServed

_chosen: contextvars.ContextVar[str | None] = contextvars.ContextVar("flash_attn_backend", default=None)


def _flaggems() -> str:
    """The backend that is named where FLASH_ATTENTION_USE_FLAGGEMS names one and use_backend does not."""
    if (name := _chosen.get()) is not None:
        return name
    if missing := _missing(BUILT_IN["flaggems"]["needs"]):
        raise NotServed(
            f"FLASH_ATTENTION_USE_FLAGGEMS: {missing}; install flag_gems (pip install flag_gems) and the Triton of the "
            "device's vendor (pip install triton for NVIDIA and AMD), or unset the variable, or choose among "
            f"{', '.join(b.name for b in backends())} with FLASH_ATTENTION_BACKEND or flash_attn.use_backend()"
        )
    return "flaggems"


def _missing(modules: Iterable[str]) -> str:
    """Which modules are not installed, in words. None is imported."""
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    return f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed" if missing else ""


# FLASH_ATTENTION_BACKEND is read by the core. The older FLASH_ATTENTION_USE_FLAGGEMS is never silently ignored.
_asks_for_flaggems = os.environ.get("FLASH_ATTENTION_USE_FLAGGEMS", "0").lower() not in ("", "0", "false", "off", "no")
current = _flaggems if _asks_for_flaggems and not os.environ.get("FLASH_ATTENTION_BACKEND") else _chosen.get


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Within the block, calls run on the backend of this name (None: the automatic choice), or fail.

    A backend that is named runs both passes, also where the backward comes after the block. Under torch.compile the
    switch counts when the compiled code runs, and in its thread: a compiled backward of a GPU runs in autograd's, where
    only FLASH_ATTENTION_BACKEND is heard.
    """
    if name is not None and name not in (known := [b.name for b in backends()]):
        raise InvalidArgument(f"backend: expected one of {', '.join(known)}, got {name!r}")
    token = _chosen.set(name)
    try:
        yield
    finally:
        _chosen.reset(token)


class Capabilities(NamedTuple):
    """What a backend serves of one pass."""

    dtypes: tuple[str, ...]
    features: tuple[str, ...]
    max_headdim: int  # 0: any
    headdim_multiple: int


class Backend(NamedTuple):
    name: str
    description: str
    unavailable: str  # why this machine cannot use it; empty if it can
    devices: tuple[str, ...]  # torch's names
    forward: Capabilities | None  # None: not served
    backward: Capabilities | None


# DLPack's device types by torch's names. ROCm is "cuda" to torch; devices from outside torch export one type.
_DEVICE_TYPES = {"cpu": (1,), "cuda": (2, 10), "mps": (8,), "xpu": (14,), "npu": (12,)}
_NAMES_OF_TYPES = {t: name for name, types in _DEVICE_TYPES.items() for t in types}
_OTHERS_TYPE = 12


def backends() -> list[Backend]:
    """Every backend that this process knows, the preferred first."""
    result = []
    for name, description, unavailable, devices, forward, backward in _C.backends():
        names = tuple(dict.fromkeys(_NAMES_OF_TYPES.get(t, str(t)) for t in devices))
        passes = (None if c is None else Capabilities(*c) for c in (forward, backward))
        result.append(Backend(name, description, unavailable, names, *passes))
    return result


def features() -> tuple[str, ...]:
    """The names of all that a call may use, as `register_backend` takes them."""
    return _C.feature_names()


def register_backend(
    name: str,
    engine,
    *,
    devices: Iterable[str],
    dtypes: Iterable[str],
    serves: Iterable[str],
    backward: Iterable[str] | None = None,
    description: str = "",
    max_headdim: int | None = None,
    headdim_multiple: int = 1,
    needs: Iterable[str] = (),
    automatic: bool = True,
    before: str | None = None,
    words: Mapping[str, str] | None = None,
) -> None:
    """Adds a backend written in Python, or takes the place of one of that name.

    engine      an object with forward(p, t) and perhaps backward(p, t), refuses(p), plan(p) (see flash_attn._engines),
                or "module:attribute" of a class of such objects, imported when it is first needed
    devices     torch's names: "cpu", "cuda", "mps", "xpu", "npu"; devices from outside torch are all "npu"
    dtypes      "float16", "bfloat16", "float32", "float64"
    serves      names of features() that the forward serves; a call that uses any other is refused
    backward    the same of the backward; None: it has none, and another backend runs it
    needs       modules without which it is unavailable; they are looked for, not imported
    automatic   whether it may be chosen without being named
    before      the backend that it is preferred to; None: it comes last
    words       of a refusal, by feature, instead of "softcap: not served"
    """
    if isinstance(devices, str):
        raise InvalidArgument(f"devices: expected several names, as ({devices!r},), got {devices!r}")
    if isinstance(engine, str) and engine.count(":") != 1:
        raise InvalidArgument(f'engine: expected an object, or "module:attribute", got {engine!r}')
    types = [t for d in devices for t in _DEVICE_TYPES.get(d, (_OTHERS_TYPE,))]
    unavailable = _missing(needs)
    limits = (tuple(dtypes), max_headdim or 0, headdim_multiple, dict(words or {}))

    def capabilities(served):
        return None if served is None else (limits[0], tuple(served), *limits[1:])

    settings = (name, description, types, capabilities(serves), capabilities(backward), automatic)
    _engines.add(name, engine, settings, unavailable, before or "")


def unregister_backend(name: str) -> None:
    """Takes a backend written in Python out again."""
    _engines.remove(name)


for _name, _settings in BUILT_IN.items():
    register_backend(_name, **_settings)
