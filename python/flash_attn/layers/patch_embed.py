"""Patches of an image as tokens (Dosovitskiy et al., arXiv 2010.11929): a linear layer of each patch."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules.utils import _pair

from flash_attn._errors import InvalidArgument
from flash_attn.ops.fused_dense import FusedDense


class PatchEmbed(nn.Module):
    """Images (batch, in_chans, height, width) -> (batch, patches, embed_dim), row by row.

    Or (batch, rows, columns, embed_dim) without `flatten`. Sizes are numbers or pairs (height, width).
    """

    def __init__(
        self,
        img_size=224,
        patch_size=16,
        in_chans=3,
        embed_dim=768,
        norm_layer=None,
        flatten=True,
        bias=True,
        fused_bias_fc=False,
    ):
        super().__init__()
        self.img_size, self.patch_size = _pair(img_size), _pair(patch_size)
        if any(n % p for n, p in zip(self.img_size, self.patch_size, strict=True)):
            raise InvalidArgument(f"img_size: expected a multiple of patch_size {self.patch_size}, got {self.img_size}")
        self.grid_size = tuple(n // p for n, p in zip(self.img_size, self.patch_size, strict=True))
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.flatten = flatten
        linear = FusedDense if fused_bias_fc and bias else nn.Linear
        self.proj = linear(in_chans * self.patch_size[0] * self.patch_size[1], embed_dim, bias=bias)
        self.norm = norm_layer(embed_dim) if norm_layer else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if tuple(x.shape[2:]) != self.img_size:
            raise InvalidArgument(f"x: expected images of {self.img_size}, got {tuple(x.shape[2:])}")
        (rows, columns), (height, width) = self.grid_size, self.patch_size
        patches = x.reshape(*x.shape[:2], rows, height, columns, width).permute(0, 2, 4, 1, 3, 5).flatten(3)
        x = self.proj(patches)
        return self.norm(x.flatten(1, 2) if self.flatten else x)
