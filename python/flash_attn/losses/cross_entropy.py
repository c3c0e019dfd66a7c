"""Cross entropy as a module."""

from __future__ import annotations

import torch
from torch import Tensor

from flash_attn._errors import NotServed
from flash_attn.ops._cross_entropy import cross_entropy_loss

__all__ = ["CrossEntropyLoss", "cross_entropy_loss"]


class CrossEntropyLoss(torch.nn.Module):
    """ops.triton.cross_entropy.cross_entropy_loss, reduced: "mean" over labels that are not ignored, "sum" or "none".

    return_z_loss: also the z-loss, reduced in the same way, for a log.
    """

    def __init__(
        self,
        ignore_index=-100,
        reduction="mean",
        label_smoothing=0.0,
        logit_scale=1.0,
        lse_square_scale=0.0,
        inplace_backward=False,
        process_group=None,
        return_z_loss=False,
    ):
        super().__init__()
        if reduction not in ("mean", "none", "sum"):
            raise NotServed(f'reduction: expected "mean", "none" or "sum", got {reduction!r}')
        self.ignore_index, self.reduction = ignore_index, reduction
        self.label_smoothing, self.logit_scale, self.lse_square_scale = label_smoothing, logit_scale, lse_square_scale
        self.inplace_backward, self.process_group = inplace_backward, process_group
        self.return_z_loss = return_z_loss

    def _reduced(self, x: Tensor, target: Tensor) -> Tensor:
        if self.reduction == "none":
            return x
        return x.sum() if self.reduction == "sum" else x.sum() / (target != self.ignore_index).sum()

    def forward(self, input: Tensor, target: Tensor, precomputed_lse: Tensor | None = None):
        """input (batch, vocab_size), target (batch) -> loss () or (batch), fp32; with return_z_loss (loss, z_loss)."""
        loss, z_loss = cross_entropy_loss(
            input,
            target,
            precomputed_lse=precomputed_lse,
            label_smoothing=self.label_smoothing,
            logit_scale=self.logit_scale,
            lse_square_scale=self.lse_square_scale,
            ignore_index=self.ignore_index,
            inplace_backward=self.inplace_backward,
            process_group=self.process_group,
        )
        loss = self._reduced(loss, target)
        return (loss, self._reduced(z_loss, target)) if self.return_z_loss else loss
