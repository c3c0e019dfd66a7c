"""FlashAttention-Plus: the flash_attn API, exact, on whatever hardware there is."""

from pkgutil import extend_path

__path__ = extend_path(__path__, __name__)  # another distribution may add submodules (flash_attn.cute)

# What callers compare with `flash_attn.__version__` is the API they program against ("2.7.4" or newer, the major number
# is 2, ...), so the module answers with the upstream version whose API this is. Ours is __plus_version__; the name and
# version of the distribution are the package metadata's business.
__upstream_version__ = "2.8.3"
__version__ = __upstream_version__

try:
    import torch  # first: _C runs on the threads of the OpenMP runtime that torch loads
except ModuleNotFoundError as e:
    if e.name != "torch":  # there, and broken
        raise
    torch = None

from flash_attn import _stand_in
from flash_attn._arrays import Gradients, attention, attention_backward
from flash_attn._backend import (
    Backend,
    Capabilities,
    backends,
    features,
    register_backend,
    unregister_backend,
    use_backend,
)
from flash_attn._C import cpu_isa, cpu_isas, num_threads, set_num_threads
from flash_attn._C import version as _version
from flash_attn._errors import DeviceFailure, InternalError, InvalidArgument, InvalidType, NotServed, OutOfMemory

if torch is not None:
    from flash_attn._explain import Candidate, Explanation, explain
    from flash_attn._run import check_tables
    from flash_attn.flash_attn_interface import (
        flash_attn_func,
        flash_attn_kvpacked_func,
        flash_attn_qkvpacked_func,
        flash_attn_varlen_func,
        flash_attn_varlen_kvpacked_func,
        flash_attn_varlen_qkvpacked_func,
        flash_attn_with_kvcache,
    )

__plus_version__ = _version()
_stand_in.install()
backend = use_backend  # its name before there was register_backend

__all__ = [
    "Backend",
    "Candidate",
    "Capabilities",
    "DeviceFailure",
    "Explanation",
    "Gradients",
    "InternalError",
    "InvalidArgument",
    "InvalidType",
    "NotServed",
    "OutOfMemory",
    "attention",
    "attention_backward",
    "backend",
    "backends",
    "check_tables",
    "cpu_isa",
    "cpu_isas",
    "explain",
    "features",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "num_threads",
    "register_backend",
    "set_num_threads",
    "unregister_backend",
    "use_backend",
]

_names_of_torch = frozenset(__all__) - globals().keys()
__all__ = [name for name in __all__ if name not in _names_of_torch]  # noqa: PLE0604


def __getattr__(name: str):
    if name == "jax":
        import importlib

        return importlib.import_module("flash_attn.jax")
    if name in _names_of_torch:
        raise ModuleNotFoundError(
            f"flash_attn.{name} is made for torch.Tensor, and torch is not installed: pip install 'torch>=2.4'; "
            "flash_attn.attention takes any array without it",
            name="torch",
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
