"""Whether a function of numbers may be called with tensors that broadcast: as by torch.vmap, without its 0.2 ms.

It may if each operation on what depends on the numbers is one that PyTorch marks as pointwise, or looks numbers up in
a table, and all else that takes part is a number. Operations are seen as the dispatcher sees them, in one call.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

_POINTWISE = torch.Tag.pointwise
_ELEMENTWISE = [
    getattr(torch.ops.aten, name).default for name in ("_to_copy", "detach", "zeros_like", "ones_like", "full_like")
]
_LOOKUP = torch.ops.aten.index.Tensor


# What tells a number from a block without an operation.
_SHAPE = {
    Tensor.shape.__get__,
    Tensor.ndim.__get__,
    Tensor.size,
    Tensor.dim,
    Tensor.numel,
    Tensor.stride,
    Tensor.__len__,
}


class _WatchShapes(TorchFunctionMode):
    asked = False

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.asked = self.asked or function in _SHAPE
        return function(*args, **(kwargs or {}))


class _IsNot(Exception):
    """Raised before an operation that is none, which is not done: of tensors that broadcast it is another one, and a
    lookup outside of a table ends a CUDA context."""


class _Watch(TorchDispatchMode):
    def __init__(self, numbers):
        super().__init__()
        self.ours = {id(x): x for x in numbers}  # what depends on the numbers; alive, so that ids stay theirs
        self.pointwise = True

    def _serves(self, operation, args, kwargs) -> bool:
        if operation._schema.is_mutable:
            return False
        if operation is _LOOKUP:
            table, index = args
            numbers = all(x is not None and (id(x) in self.ours or x.dim() == 0) for x in index)
            return id(table) not in self.ours and len(index) == table.dim() and numbers
        tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        known = _POINTWISE in operation.tags or operation in _ELEMENTWISE
        return known and all(id(x) in self.ours or x.dim() == 0 for x in tensors)

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        leaves = pytree.tree_leaves((args, kwargs))
        depends = any(id(x) in self.ours for x in leaves)
        if depends and not self._serves(operation, args, kwargs):
            self.pointwise = False
            raise _IsNot
        results = operation(*args, **(kwargs or {}))
        if depends:
            self.ours.update((id(x), x) for x in pytree.tree_leaves(results) if isinstance(x, Tensor))
        return results


def is_pointwise(call: Callable, numbers: tuple[Tensor, ...]) -> bool:
    """`call(*numbers)`, of tensors that broadcast; each has more than one element, so that none passes for a number."""
    with _Watch(numbers) as watch, _WatchShapes() as shapes:
        try:
            result = call(*numbers)
        except Exception:  # whatever it is, the number-by-number call will say it
            return False
    return (
        watch.pointwise
        and not shapes.asked
        and (not isinstance(result, Tensor) or result.dim() == 0 or id(result) in watch.ours)
    )
