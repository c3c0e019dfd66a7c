"""Vision transformers (Dosovitskiy et al., arXiv 2010.11929), with timm's names of weights."""

from __future__ import annotations

import re
from functools import partial

import torch
from torch import Tensor, nn

from flash_attn._errors import NotServed
from flash_attn.layers.patch_embed import PatchEmbed
from flash_attn.modules.block import Block, StochasticDepth
from flash_attn.modules.mha import MHA
from flash_attn.modules.mlp import FusedMLP, Mlp
from flash_attn.ops.triton.layer_norm import layer_norm_fn

__all__ = [
    "VisionTransformer",
    "create_block",
    "create_mixer_cls",
    "create_mlp_cls",
    "init_weights_vit_timm",
    "vit_base_patch16_224",
]


def create_mixer_cls(num_heads, qkv_bias, attn_drop, use_flash_attn, fused_bias_fc, cross_attn=False):
    return partial(
        MHA,
        num_heads=num_heads,
        cross_attn=cross_attn,
        qkv_proj_bias=qkv_bias,
        dropout=attn_drop,
        fused_bias_fc=fused_bias_fc,
        use_flash_attn=use_flash_attn,
    )


def create_mlp_cls(embed_dim, mlp_ratio, act_layer, fused_mlp):
    """fused_mlp: GELU by its tanh, whatever act_layer is."""
    width = int(embed_dim * mlp_ratio)
    if fused_mlp:
        return partial(FusedMLP, hidden_features=width)
    return partial(Mlp, hidden_features=width, activation=act_layer())


def create_block(
    embed_dim,
    num_heads,
    mlp_ratio,
    qkv_bias,
    drop_rate,
    attn_drop_rate,
    drop_path1,
    drop_path2,
    norm_layer,
    act_layer,
    use_flash_attn,
    fused_bias_fc,
    fused_mlp,
    fused_dropout_add_ln,
    layer_idx=None,
    n_layer=None,
    last_layer_subset=False,
):
    """last_layer_subset: the last layer asks from some positions only, by cross-attention."""
    cross_attn = last_layer_subset and layer_idx == n_layer - 1
    return Block(
        embed_dim,
        create_mixer_cls(num_heads, qkv_bias, attn_drop_rate, use_flash_attn, fused_bias_fc, cross_attn),
        create_mlp_cls(embed_dim, mlp_ratio, act_layer, fused_mlp),
        norm_cls=norm_layer,
        resid_dropout1=drop_rate,
        resid_dropout2=drop_rate,
        drop_path1=drop_path1,
        drop_path2=drop_path2,
        fused_dropout_add_ln=fused_dropout_add_ln,
        residual_in_fp32=True,
    )


def init_weights_vit_timm(module: nn.Module, name: str = "") -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class VisionTransformer(nn.Module):
    """Images (batch, in_chans, height, width) -> logits (batch, num_classes), from the class token.

    num_classes 0: its features instead. drop_path_rate: of the last layer; it grows from 0. no_embed_class: the class
    token has no position. load_state_dict also takes timm's weights. Not served, as in the original: other pooling,
    LayerScale (init_values), a norm before the blocks.
    """

    def __init__(
        self,
        img_size=224,
        patch_size=16,
        in_chans=3,
        num_classes=1000,
        global_pool="token",
        embed_dim=768,
        depth=12,
        num_heads=12,
        mlp_ratio=4.0,
        qkv_bias=True,
        init_values=None,
        class_token=True,
        no_embed_class=False,
        pre_norm=False,
        fc_norm=None,
        drop_rate=0.0,
        attn_drop_rate=0.0,
        drop_path_rate=0.0,
        weight_init="",
        embed_layer=PatchEmbed,
        norm_layer=None,
        act_layer=None,
        use_flash_attn=False,
        fused_bias_fc=False,
        fused_mlp=False,
        fused_dropout_add_ln=False,
    ):
        super().__init__()
        served = dict(
            global_pool=(global_pool, "token"),
            class_token=(class_token, True),
            init_values=(init_values, None),
            weight_init=(weight_init, ""),
            fc_norm=(fc_norm, None),
            pre_norm=(pre_norm, False),
        )
        for name, (given, expected) in served.items():
            if given != expected:
                raise NotServed(f"{name}: expected {expected!r}, got {given!r}")
        norm_layer = norm_layer or partial(nn.LayerNorm, eps=1e-6)
        act_layer = act_layer or nn.GELU
        self.num_classes, self.global_pool, self.no_embed_class = num_classes, global_pool, no_embed_class
        self.num_features = self.embed_dim = embed_dim
        self.num_prefix_tokens = 1
        extra = {"fused_bias_fc": fused_bias_fc} if embed_layer is PatchEmbed else {}
        self.patch_embed = embed_layer(
            img_size=img_size, patch_size=patch_size, in_chans=in_chans, embed_dim=embed_dim, bias=True, **extra
        )
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        positions = self.patch_embed.num_patches + (0 if no_embed_class else 1)
        self.pos_embed = nn.Parameter(torch.zeros(1, positions, embed_dim))
        rates = torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()
        self.blocks = nn.ModuleList(
            [
                create_block(
                    embed_dim,
                    num_heads,
                    mlp_ratio,
                    qkv_bias,
                    drop_rate,
                    attn_drop_rate,
                    drop_path1=rates[i - 1] if i > 0 else 0.0,
                    drop_path2=rates[i],
                    norm_layer=norm_layer,
                    act_layer=act_layer,
                    use_flash_attn=use_flash_attn,
                    fused_bias_fc=fused_bias_fc,
                    fused_mlp=fused_mlp,
                    fused_dropout_add_ln=fused_dropout_add_ln,
                    layer_idx=i,
                    n_layer=depth,
                    last_layer_subset=True,
                )
                for i in range(depth)
            ]
        )
        self.dropout = nn.Dropout(drop_rate)
        self.drop_path = StochasticDepth(rates[-1])
        self.norm = norm_layer(embed_dim)
        self.fused_dropout_add_ln = fused_dropout_add_ln
        self.head = nn.Linear(embed_dim, num_classes) if num_classes > 0 else nn.Identity()
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6)
        self.apply(init_weights_vit_timm)

    def no_weight_decay(self):
        return {"pos_embed", "cls_token"}

    def _pos_embed(self, x: Tensor) -> Tensor:
        token = self.cls_token.expand(x.shape[0], -1, -1)
        if self.no_embed_class:
            return torch.cat((token, x + self.pos_embed), dim=1)
        return torch.cat((token, x), dim=1) + self.pos_embed

    def forward_features(self, x, all_tokens=True):
        """-> (batch, 1 + patches, embed_dim), or without all_tokens (batch, 1, embed_dim), the class token's."""
        x, residual = self._pos_embed(self.patch_embed(x)), None
        for block in self.blocks[:-1]:
            x, residual = block(x, residual)
        subset = None if all_tokens else slice(0, 1)
        x, residual = self.blocks[-1](x, residual, mixer_subset=subset)
        if not self.fused_dropout_add_ln:
            h = self.drop_path(self.dropout(x)) + residual
            return self.norm(h.to(self.norm.weight.dtype))
        rowscale = None
        if self.training and self.drop_path.p > 0.0:
            rowscale = self.drop_path(x.new_ones(x.shape[:-1]))
        return layer_norm_fn(
            x,
            self.norm.weight,
            self.norm.bias,
            residual=residual,
            eps=self.norm.eps,
            dropout_p=self.dropout.p if self.training else 0.0,
            rowscale=rowscale,
        )

    def forward_head(self, x, pre_logits: bool = False):
        return x[:, 0] if pre_logits else self.head(x[:, 0])

    def forward(self, x):
        return self.forward_head(self.forward_features(x, all_tokens=False))

    def load_state_dict(self, state_dict, strict=True, **kwargs):
        """Weights of this model, or timm's: a convolution for the patches, attn.qkv and attn.proj."""
        weights = {}
        for name, x in state_dict.items():
            name = re.sub(r"^blocks\.(\d+)\.attn\.qkv\.", r"blocks.\1.mixer.Wqkv.", name)
            name = re.sub(r"^blocks\.(\d+)\.attn\.proj\.", r"blocks.\1.mixer.out_proj.", name)
            weights[name] = x
        patches = weights.get("patch_embed.proj.weight")
        if patches is not None and patches.dim() == 4:
            weights["patch_embed.proj.weight"] = patches.flatten(1)
        last = f"blocks.{len(self.blocks) - 1}.mixer"
        for kind in ("weight", "bias"):
            qkv = weights.pop(f"{last}.Wqkv.{kind}", None)
            if qkv is not None:
                weights[f"{last}.Wq.{kind}"] = qkv[: self.embed_dim]
                weights[f"{last}.Wkv.{kind}"] = qkv[self.embed_dim :]
        return super().load_state_dict(weights, strict=strict, **kwargs)


def vit_base_patch16_224(pretrained=False, **kwargs):
    """ViT-B/16 for images of 224 by 224; weights by load_state_dict."""
    if pretrained:
        raise NotServed("pretrained: nothing is downloaded; expected False")
    return VisionTransformer(patch_size=16, embed_dim=768, depth=12, num_heads=12, **kwargs)
