"""A mask that is one interval of keys per row, as a tensor without memory.

A model hands its mask from where it is made to every layer, and may look at it on the way. So RowMask is a bool tensor
(batch, 1, seqlen_q, seqlen_k) to all the world: whoever computes with it gets the dense mask, made for the purpose.
Attention alone asks for the interval, and seqlen_q x seqlen_k elements are never written.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

_aten = torch.ops.aten
_SAME = (_aten.detach.default, _aten.alias.default, _aten.clone.default)
_TENSORS = ("shift", "first", "stop", "keys", "sequence")


class RowMask(torch.Tensor):
    """Query row i stands at key p = shift + i and sees the keys [p - left, p + right] (-1: no limit).

    shift     tensor (), on a device perhaps, and not to be waited for
    aligned   True: shift is known to be seqlen_k - seqlen_q, so that the last query stands at the last key
    first     (batch) int32: a sequence's keys are [first, stop), cut at shift + seqlen_q if right = 0. None if all
    stop      rows are in use
    keys      (batch, seqlen_k) bool: keys in use, where they are no interval
    sequence  (batch, seqlen) int: the sequence of each token, if a row holds several; seqlen_q = seqlen_k, shift = 0
    padding   "none"; "left": every stop is as far right as it can be; "ends": padding on both; "holes": see keys
    """

    @staticmethod
    def __new__(cls, shape, device, *, shift, aligned, left=-1, right=-1, padding="none", **tensors):
        """shape (batch, seqlen_q, seqlen_k)."""
        batch, seqlen_q, seqlen_k = shape
        self = torch.Tensor._make_wrapper_subclass(cls, (batch, 1, seqlen_q, seqlen_k), dtype=torch.bool, device=device)
        self.shift, self.aligned, self.left, self.right, self.padding = shift, aligned, left, right, padding
        for name in _TENSORS[1:]:
            setattr(self, name, tensors.get(name))
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _SAME:
            return args[0]._moved(args[0].device)
        if func is _aten._to_copy.default and kwargs.get("dtype") in (None, torch.bool):
            return args[0]._moved(kwargs.get("device") or args[0].device, kwargs.get("non_blocking", False))
        args, kwargs = tree_map_only(RowMask, RowMask.dense, (args, kwargs))
        return func(*args, **kwargs)

    def _moved(self, device: torch.device, non_blocking: bool = False) -> RowMask:
        """On another device, where a model's layers are spread over several."""
        names, (shape, _, *rest) = self.__tensor_flatten__()
        tensors = {name: getattr(self, name).to(device, non_blocking=non_blocking) for name in names}
        return self.__tensor_unflatten__(tensors, (shape, device, *rest), None, None)

    def __tensor_flatten__(self):
        """What torch.compile asks of a tensor that holds others. The second part is what a graph is made for."""
        names = [name for name in _TENSORS if getattr(self, name) is not None]
        batch, _, seqlen_q, seqlen_k = self.shape
        return names, ((batch, seqlen_q, seqlen_k), self.device, self.aligned, self.left, self.right, self.padding)

    @staticmethod
    def __tensor_unflatten__(tensors, rest, outer_size, outer_stride):
        shape, device, aligned, left, right, padding = rest
        if outer_size is not None:
            shape = (outer_size[0], outer_size[2], outer_size[3])
        return RowMask(shape, device, **tensors, aligned=aligned, left=left, right=right, padding=padding)

    def __repr__(self, **_):
        kinds = f"left={self.left}, right={self.right}, padding={self.padding!r}, packed={self.sequence is not None}"
        return f"RowMask({tuple(self.shape)}, shift={self.shift}, {kinds})"

    def key_mask(self) -> Tensor | None:
        """(batch, seqlen_k) bool: keys in use. None if all are."""
        if self.first is None or self.keys is not None:
            return self.keys
        j = torch.arange(self.shape[3], device=self.device)
        return (j >= self.first[:, None]) & (j < self.stop[:, None])

    def dense(self) -> Tensor:
        """(batch, 1, seqlen_q, seqlen_k) bool."""
        batch, _, seqlen_q, seqlen_k = self.shape
        p = torch.arange(seqlen_q, device=self.device)[:, None] + self.shift
        j = torch.arange(seqlen_k, device=self.device)
        seen = torch.ones((batch, 1, seqlen_q, seqlen_k), dtype=torch.bool, device=self.device)
        if self.left >= 0:
            seen &= j >= p - self.left
        if self.right >= 0:
            seen &= j <= p + self.right
        if (keys := self.key_mask()) is not None:
            seen &= keys[:, None, None, :]
        if self.sequence is not None:
            seen &= (self.sequence[:, :, None] == self.sequence[:, None, :])[:, None]
        return seen

    @property
    def bounded(self) -> bool:
        """Whether it matters where the queries stand."""
        return self.left >= 0 or self.right >= 0


def row_mask(shape, device, *, padding_mask=None, shift=0, left=-1, right=-1, sequence=None) -> RowMask:
    """The mask of `padding_mask` (batch, seqlen_k), bool or None, and a window; shift: int or a tensor ().

    Waits for the device once, if there is padding to look at.
    """
    _, seqlen_q, seqlen_k = shape
    if not isinstance(shift, Tensor):
        aligned, shift = shift == seqlen_k - seqlen_q, torch.full((), shift, dtype=torch.int64, device=device)
    else:
        aligned = shift.device.type == "cpu" and int(shift) == seqlen_k - seqlen_q
    common = dict(shift=shift, aligned=aligned, left=left, right=right)
    if padding_mask is None:
        return RowMask(shape, device, **common, sequence=sequence)
    j = torch.arange(seqlen_k, device=device)
    first = padding_mask.to(torch.int8).argmax(-1)
    stop = first + padding_mask.sum(-1)
    whole = (padding_mask == ((j >= first[:, None]) & (j < stop[:, None]))).all()
    reach = torch.as_tensor(seqlen_k if right != 0 else shift + seqlen_q, device=device).clamp(max=seqlen_k)
    whole, from_start, to_end = torch.stack([whole, (first == 0).all(), (stop >= reach).all()]).tolist()
    if not whole:
        return RowMask(shape, device, **common, padding="holes", keys=padding_mask, sequence=sequence)
    if from_start and to_end:
        return RowMask(shape, device, **common, sequence=sequence)
    # Causal: keys behind the last query are seen by nobody, as the empty rest of a static cache is.
    stop = torch.minimum(stop, reach).to(torch.int32)
    first = torch.minimum(first.to(torch.int32), stop)
    padding = "left" if to_end else "ends"
    return RowMask(shape, device, **common, padding=padding, first=first, stop=stop, sequence=sequence)
