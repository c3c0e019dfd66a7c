"""Dropout as a function of position, with the bits of every other engine: Philox4x32-10 on (seed, offset; b, h, i, j).

  keep(b, h, i, j) = bits16(philox(key, counter))[j % 8] >= threshold
    key     = (seed lo, seed hi ^ offset hi)
    counter = (j / 8, i, b * nheads + h, offset lo)

Words of 32 bits are kept in int64, which every device of torch has.
Philox: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flash_attn._engines.torch.sequences import positions

_WORD = 0xFFFFFFFF


def _multiply(m: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """m * x of two words, exactly: high word, low word. In halves of x, so that no product leaves 48 bits."""
    high, low = m * (x >> 16), m * (x & 0xFFFF)
    return (high + (low >> 16)) >> 16, (((high & 0xFFFF) << 16) + low) & _WORD


def philox4x32_10(c0, c1, c2, c3, k0, k1):
    """Counters: tensors of words; keys: words, or tensors without dimensions."""
    for _ in range(10):
        high0, low0 = _multiply(0xD2511F53, c0)
        high2, low2 = _multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high2 ^ c1 ^ k0, low2, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3


class Dropout:
    def __init__(self, p, t):
        self.threshold, self.scale, self.nheads, self.device = p.drop_threshold, p.drop_scale, p.nheads, t.q.device
        seed, offset = (p.seed, p.offset) if t.dropout_state is None else t.dropout_state.unbind(0)
        self.key = (seed & _WORD, ((seed >> 32) ^ (offset >> 32)) & _WORD)
        self.offset = offset & _WORD

    def factors(self, b: slice, i: slice, j: slice, dtype: torch.dtype) -> Tensor:
        """(C, H, R, N): what probabilities are multiplied by. j.start is a multiple of 8."""
        eights = slice(j.start // 8, -(-j.stop // 8))
        plane = positions(b, self.device)[:, None] * self.nheads + positions(slice(0, self.nheads), self.device)
        c0 = positions(eights, self.device) & _WORD  # (N / 8)
        c1 = (positions(i, self.device) & _WORD)[:, None]  # (R, 1)
        c2 = (plane & _WORD)[:, :, None, None]  # (C, H, 1, 1)
        words = torch.stack(philox4x32_10(c0, c1, c2, torch.zeros_like(c0) + self.offset, *self.key), -1)
        halves = torch.stack((words & 0xFFFF, words >> 16), -1)  # (C, H, R, N / 8, 4, 2)
        kept = (halves >= self.threshold).flatten(-3)[..., : j.stop - j.start]
        return kept.to(dtype) * self.scale
