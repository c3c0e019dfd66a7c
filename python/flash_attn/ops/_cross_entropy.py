"""Cross entropy over a vocabulary, or a part of one per process, in blocks of rows.

With x = logit_scale * logits, lse = log sum exp x and V classes, the loss of a row with label y is

    lse - (1 - label_smoothing) * x[y] - label_smoothing / V * sum x + lse_square_scale * lse^2

and its gradient, with p = exp(x - lse),

    logit_scale * (p * (1 + 2 * lse_square_scale * lse) - (1 - label_smoothing) * [class is y] - label_smoothing / V).

What is kept for the gradient is the logits and one lse a row. The gradient is the only other tensor of their size, and
with `inplace_backward` there is none. Arithmetic in fp32 (fp64 for fp64).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from flash_attn._errors import InvalidArgument, InvalidType
from flash_attn._tensors import is_plain, result_of_function
from flash_attn.ops._blocks import row_blocks
from flash_attn.utils.distributed import all_gather_raw


def check(logits: Tensor, labels: Tensor, precomputed_lse: Tensor | None, ignore_index: int, classes: int) -> None:
    if logits.dim() != 2:
        raise InvalidArgument(f"logits: expected 2 dimensions (batch, vocab_size), got {tuple(logits.shape)}")
    if not logits.is_floating_point():
        raise InvalidType(f"logits: expected floating point numbers, got {logits.dtype}")
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise InvalidType(f"labels: expected integers, got {labels.dtype}")
    for name, t in (("labels", labels), ("precomputed_lse", precomputed_lse)):
        if t is not None and t.shape != logits.shape[:1]:
            raise InvalidArgument(f"{name}: expected shape (batch,) = ({logits.shape[0]},), got {tuple(t.shape)}")
    if labels.device.type == "cpu" and is_plain(labels):
        wrong = labels[((labels < 0) | (labels >= classes)) & (labels != ignore_index)]
        if wrong.numel():
            raise InvalidArgument(
                f"labels: expected 0 to {classes - 1}, or ignore_index = {ignore_index}, got {int(wrong[0])}"
            )


def _scaled(logits: Tensor, dtype: torch.dtype, scale: float) -> Tensor:
    """A block of logits as a new tensor in the dtype of the arithmetic."""
    x = logits.to(dtype, copy=True)
    return x if scale == 1.0 else x.mul_(scale)


class CrossEntropyLoss(torch.autograd.Function):
    """-> losses (batch), z_losses (batch): the part of lse_square_scale, which has no gradient of its own."""

    @staticmethod
    def forward(
        ctx,
        logits,
        labels,
        precomputed_lse=None,
        smoothing=0.0,
        logit_scale=1.0,
        lse_square_scale=0.0,
        ignore_index=-100,
        inplace_backward=False,
        process_group=None,
    ):
        world, rank = (
            (1, 0) if process_group is None else (dist.get_world_size(process_group), dist.get_rank(process_group))
        )
        batch, classes = logits.shape[0], logits.shape[-1]
        check(logits, labels, precomputed_lse, ignore_index, world * classes)
        dtype = torch.promote_types(logits.dtype, torch.float32)
        known_lse = precomputed_lse is not None and logit_scale == 1.0 and smoothing == 0.0
        lse = precomputed_lse.to(dtype) if known_lse else logits.new_empty(batch, dtype=dtype)
        # What the label and the smoothing take off: summed over processes, it and lse are the loss.
        taken = logits.new_zeros(batch, dtype=dtype)
        local = labels.long() - rank * classes
        here = (local >= 0) & (local < classes)
        column = local.clamp(0, max(classes - 1, 0))[:, None]
        if classes:
            of_label = logits.gather(1, column)[:, 0].to(dtype) * logit_scale
            taken += torch.where(here, (1 - smoothing) * of_label, 0.0)
        for block in () if known_lse else row_blocks(batch, classes, logits.device):
            x = _scaled(logits[block], dtype, logit_scale)
            if smoothing:
                taken[block] += x.sum(-1) * (smoothing / (world * classes))
            lse[block] = torch.logsumexp(x, -1)
        if world > 1:
            everyone, _ = all_gather_raw(torch.stack((lse, taken))[None], process_group)
            lse, taken = torch.logsumexp(everyone[:, 0], 0), everyone[:, 1].sum(0)
        losses = lse - taken
        # A label of no class is refused above on a CPU. Where nobody looked, its loss is NaN.
        ignored = labels == ignore_index
        losses = losses.masked_fill_((labels < 0) | (labels >= world * classes), torch.nan)
        z_losses = (lse_square_scale * lse.square()).masked_fill_(ignored, 0.0)
        losses = result_of_function((losses + z_losses).masked_fill_(ignored, 0.0))
        ctx.save_for_backward(logits, lse, labels)
        ctx.mark_non_differentiable(z_losses)
        ctx.options = smoothing, logit_scale, lse_square_scale, ignore_index, inplace_backward, world, rank
        return losses, z_losses

    @staticmethod
    @once_differentiable
    def backward(ctx, dlosses, _):
        logits, lse, labels = ctx.saved_tensors
        smoothing, logit_scale, lse_square_scale, ignore_index, inplace, world, rank = ctx.options
        classes = logits.shape[-1]
        inplace = inplace and not torch.compiler.is_compiling()  # a graph plans its own memory
        dlogits = logits.detach() if inplace else torch.empty_like(logits)
        local = (labels.long() - rank * classes)[:, None]
        here = (local >= 0) & (local < classes)
        of_label = here.to(lse.dtype) * (1 - smoothing)
        column, ignored = local.clamp(0, max(classes - 1, 0)), (labels == ignore_index)[:, None]
        weight = dlosses.to(lse.dtype)[:, None] * logit_scale
        for block in row_blocks(*logits.shape, logits.device):
            p = _scaled(logits[block], lse.dtype, logit_scale).sub_(lse[block, None]).exp_()
            if lse_square_scale:
                p.mul_(1 + 2 * lse_square_scale * lse[block, None])
            if smoothing:
                p.sub_(smoothing / (world * classes))
            if classes:
                p.scatter_add_(1, column[block], -of_label[block])
            # An ignored row has no gradient, not even NaN of what stands in it.
            dlogits[block] = p.mul_(weight[block]).masked_fill_(ignored[block], 0.0)
        return dlogits, None, None, None, None, None, None, None, None


def cross_entropy_loss(
    logits: Tensor,
    labels: Tensor,
    precomputed_lse: Tensor | None = None,
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    lse_square_scale: float = 0.0,
    ignore_index=-100,
    inplace_backward: bool = False,
    process_group=None,
) -> tuple[Tensor, Tensor]:
    """-> losses (batch) and z_losses (batch), in fp32: 0 where the label is ignore_index.

    logits (batch, vocab_size), or (batch, vocab_size / world size) of this process's classes, in the order of ranks,
    where process_group is given; labels (batch), integers, of all classes. precomputed_lse (batch): log-sum-exp of
    these logits, used where logit_scale is 1 and label_smoothing 0; no gradient flows into it. lse_square_scale: of the
    z-loss, which is in the losses, and apart in z_losses for a log. inplace_backward: the gradient is written over the
    logits. ValueError for labels that are no class; on a device, where nobody looks, their loss is NaN.
    """
    return CrossEntropyLoss.apply(
        logits, labels, precomputed_lse, label_smoothing, logit_scale, lse_square_scale, ignore_index, inplace_backward,
        process_group,
    )  # fmt: skip
