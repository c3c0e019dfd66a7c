"""Transformer blocks: a mixer and a feed-forward layer with norms, dropout and residuals between."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from flash_attn._errors import InvalidArgument
from flash_attn.modules.mha import MHA
from flash_attn.modules.mlp import Mlp
from flash_attn.ops.triton.layer_norm import RMSNorm, layer_norm_fn

__all__ = ["Block", "MHA", "Mlp", "ParallelBlock", "RMSNorm", "StochasticDepth", "layer_norm_fn"]


class StochasticDepth(nn.Module):
    """In training, with probability p a sample (mode "row": one of the batch; "batch": all) becomes 0, and the rest is
    scaled by 1 / (1 - p) (Huang et al., arXiv 1603.09382)."""

    def __init__(self, p: float, mode: str = "row") -> None:
        super().__init__()
        if not 0.0 <= p <= 1.0:
            raise InvalidArgument(f"p: expected a probability, got {p}")
        if mode not in ("row", "batch"):
            raise InvalidArgument(f"mode: expected 'row' or 'batch', got {mode!r}")
        self.p, self.mode = p, mode

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0.0:
            return x
        size = [x.shape[0] if self.mode == "row" else 1] + [1] * (x.dim() - 1)
        kept = torch.empty(size, dtype=x.dtype, device=x.device).bernoulli_(1.0 - self.p)
        return x * (kept if self.p == 1.0 else kept / (1.0 - self.p))


def _mark(parameters, sequence_parallel: bool, mark_shared_params: bool) -> None:
    """What utils.distributed's sync_shared_params and allreduce_sequence_parallel_grad look for."""
    for p in parameters:
        if sequence_parallel:
            p._sequence_parallel = True
        if mark_shared_params:
            p._shared_params = True


class Block(nn.Module):
    """prenorm: dropout, add, norm, mixer, dropout, add, norm, mlp; the result is the mlp's output and the residual that
    the next block (or a last norm) adds to it. Else, postnorm: mixer, dropout, add, norm, mlp, dropout, add, norm.

    mixer_cls, mlp_cls, norm_cls: called with dim. drop_path1, drop_path2: StochasticDepth's p. fused_dropout_add_ln:
    dropout, add and norm as one function, with the same values. return_residual: mixer and mlp return their input, too.
    residual_in_fp32: with prenorm. sequence_parallel, mark_shared_params: marks the norms' parameters.
    """

    def __init__(
        self,
        dim,
        mixer_cls=None,
        mlp_cls=None,
        norm_cls=nn.LayerNorm,
        dropout_cls=nn.Dropout,
        prenorm=True,
        resid_dropout1=0.0,
        resid_dropout2=0.0,
        drop_path1=0.0,
        drop_path2=0.0,
        fused_dropout_add_ln=False,
        return_residual=False,
        residual_in_fp32=False,
        sequence_parallel=False,
        mark_shared_params=False,
    ):
        super().__init__()
        if residual_in_fp32 and not prenorm:
            raise InvalidArgument("residual_in_fp32: needs prenorm=True")
        self.prenorm, self.fused_dropout_add_ln = prenorm, fused_dropout_add_ln
        self.return_residual, self.residual_in_fp32 = return_residual, residual_in_fp32
        self.mixer = (partial(MHA, num_heads=dim // 64) if mixer_cls is None else mixer_cls)(dim)
        self.dropout1 = dropout_cls(resid_dropout1)
        self.drop_path1 = StochasticDepth(drop_path1)
        self.norm1 = norm_cls(dim)
        self.mlp = (partial(Mlp, hidden_features=4 * dim) if mlp_cls is None else mlp_cls)(dim)
        self.has_mlp = not isinstance(self.mlp, nn.Identity)
        if self.has_mlp:
            self.dropout2 = dropout_cls(resid_dropout2)
            self.drop_path2 = StochasticDepth(drop_path2)
            self.norm2 = norm_cls(dim)
        _check_fused(self)
        for norm in [self.norm1, self.norm2] if self.has_mlp else [self.norm1]:
            _mark(norm.parameters(), sequence_parallel, mark_shared_params)

    def allocate_inference_cache(self, batch_size, max_seqlen, dtype=None, **kwargs):
        return self.mixer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)

    def _add_norm(self, x: Tensor, residual: Tensor | None, i: int) -> tuple[Tensor, Tensor | None]:
        """-> norm(h), and h with prenorm: h = drop_path(dropout(x)) + residual."""
        dropout, drop_path, norm = (getattr(self, f"{name}{i}") for name in ("dropout", "drop_path", "norm"))
        if not self.fused_dropout_add_ln:
            h = drop_path(dropout(x))
            h = h if residual is None else h + residual
            y = norm(h.to(norm.weight.dtype))
            return y, h.float() if self.residual_in_fp32 else h
        rowscale = None
        if self.training and drop_path.p > 0.0:
            rowscale = drop_path(x.new_ones(x.shape[:-1]))
        result = layer_norm_fn(
            x,
            norm.weight,
            norm.bias,
            residual=residual,
            eps=norm.eps,
            dropout_p=dropout.p if self.training else 0.0,
            rowscale=rowscale,
            prenorm=self.prenorm,
            residual_in_fp32=self.residual_in_fp32,
            is_rms_norm=isinstance(norm, RMSNorm),
        )
        return result if self.prenorm else (result, None)

    def forward(self, hidden_states: Tensor, residual: Tensor | None = None, mixer_subset=None, mixer_kwargs=None):
        """hidden_states (batch, seqlen, dim), residual of the same shape, with prenorm only -> (mlp's output, residual)
        with prenorm, else one tensor. mixer_subset: for the mixer (see MHA), and the rows of the residual that go on.
        """
        mixer_kwargs = {} if mixer_kwargs is None else dict(mixer_kwargs)
        if not self.prenorm:
            return self._postnorm(hidden_states, residual, mixer_subset, mixer_kwargs)
        x, residual = self._add_norm(hidden_states, residual, 1)
        if mixer_subset is not None:
            mixer_kwargs["mixer_subset"] = mixer_subset
            residual = residual[:, mixer_subset]
        x = self.mixer(x, **mixer_kwargs)
        if self.has_mlp:
            x, residual = self._add_norm(x, residual, 2)
            x = self.mlp(x)
        return x, residual

    def _postnorm(self, x: Tensor, residual, mixer_subset, mixer_kwargs: dict) -> Tensor:
        if residual is not None or mixer_subset is not None:
            raise InvalidArgument("residual, mixer_subset: need prenorm=True")
        mixer = partial(self.mixer, **mixer_kwargs)
        layers = [mixer, self.mlp] if self.has_mlp else [mixer]
        for i, layer in enumerate(layers, 1):
            y = layer(x)
            if self.return_residual:
                y, x = y
            x, _ = self._add_norm(y, x, i)
        return x


def _check_fused(block: nn.Module) -> None:
    if block.fused_dropout_add_ln and not (
        isinstance(block.norm1, (nn.LayerNorm, RMSNorm)) and isinstance(block.dropout1, nn.Dropout)
    ):
        raise InvalidArgument("fused_dropout_add_ln: needs LayerNorm or RMSNorm, and nn.Dropout")


class ParallelBlock(nn.Module):
    """Mixer and mlp side by side, as in GPT-J, GPT-NeoX and PaLM: dropout, add, norm, then both of them.

    tied_norm: one norm for both. The other arguments as in Block.
    """

    def __init__(
        self,
        dim,
        mixer_cls=None,
        mlp_cls=None,
        norm_cls=nn.LayerNorm,
        dropout_cls=nn.Dropout,
        resid_dropout1=0.0,
        resid_dropout2=0.0,
        tied_norm=False,
        fused_dropout_add_ln=False,
        residual_in_fp32=False,
        sequence_parallel=False,
        mark_shared_params=False,
    ):
        super().__init__()
        self.tied_norm, self.fused_dropout_add_ln = tied_norm, fused_dropout_add_ln
        self.residual_in_fp32 = residual_in_fp32
        self.mixer = (partial(MHA, num_heads=dim // 64) if mixer_cls is None else mixer_cls)(dim)
        self.dropout1 = dropout_cls(resid_dropout1)
        self.norm1 = norm_cls(dim)
        self.mlp = (partial(Mlp, hidden_features=4 * dim) if mlp_cls is None else mlp_cls)(dim)
        self.dropout2 = dropout_cls(resid_dropout2)
        if not tied_norm:
            self.norm2 = norm_cls(dim)
        _check_fused(self)
        for norm in [self.norm1] if tied_norm else [self.norm1, self.norm2]:
            _mark(norm.parameters(), sequence_parallel, mark_shared_params)

    def allocate_inference_cache(self, batch_size, max_seqlen, dtype=None, **kwargs):
        return self.mixer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)

    def _add_norm(self, x1: Tensor, x2: Tensor | None, residual: Tensor | None):
        """-> the norms of h for mixer and mlp, and h = dropout(x1) + dropout(x2) + residual."""
        norm1, norm2 = self.norm1, None if self.tied_norm else self.norm2
        if not self.fused_dropout_add_ln:
            h = self.dropout1(x1)
            h = h if x2 is None else h + self.dropout2(x2)
            h = h if residual is None else residual + h
            y1 = norm1(h.to(norm1.weight.dtype))
            y2 = y1 if norm2 is None else norm2(h.to(norm2.weight.dtype))
            return y1, y2, h.float() if self.residual_in_fp32 else h
        y1, *y2, h = layer_norm_fn(
            x1,
            norm1.weight,
            norm1.bias,
            residual=residual,
            x1=x2,
            weight1=None if norm2 is None else norm2.weight,
            bias1=None if norm2 is None else norm2.bias,
            eps=norm1.eps,
            dropout_p=self.dropout1.p if self.training else 0.0,
            prenorm=True,
            residual_in_fp32=self.residual_in_fp32,
            is_rms_norm=isinstance(norm1, RMSNorm),
        )
        return y1, y2[0] if y2 else y1, h

    def forward(
        self,
        hidden_states1: Tensor,
        hidden_states2: Tensor | None = None,
        residual: Tensor | None = None,
        mixer_kwargs=None,
    ):
        """hidden_states1: the last block's mixer's output, or the embedding; hidden_states2: its mlp's, or None.

        -> the mixer's output, the mlp's, and the residual.
        """
        x1, x2, residual = self._add_norm(hidden_states1, hidden_states2, residual)
        return self.mixer(x1, **({} if mixer_kwargs is None else mixer_kwargs)), self.mlp(x2), residual
