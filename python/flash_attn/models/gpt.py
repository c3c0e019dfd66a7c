"""Decoders, from GPT-2 to Llama, of the blocks here: a GPT2Config with more attributes says which.

Attributes beyond GPT2Config's, with their defaults: use_flash_attn=False, rotary_emb_fraction=0.0, rotary_emb_base=1e4,
rotary_emb_scale_base=None, rotary_emb_interleaved=False, use_alibi=False, window_size=(-1, -1), n_head_kv=None,
attn_dwconv=False, qkv_proj_bias, out_proj_bias, mlp_fc1_bias, mlp_fc2_bias=True, fused_bias_fc, fused_mlp,
fused_dense_sqrelu_dense, fused_dropout_add_ln=False, mlp_checkpoint_lvl=0, mlp_multiple_of=128, rms_norm=False,
prenorm=True, parallel_block=False, parallel_block_tied_norm=False, residual_in_fp32=False, sequence_parallel=True,
pad_vocab_size_multiple=1, tie_word_embeddings=True, lm_head_bias=False, norm_head=False, word_embed_proj_dim=None,
mup_scale_qk_dot_by_d=False, mup_attn_multiplier, mup_embeddings_multiplier, mup_output_multiplier, mup_width_scale=1.0.
"""

from __future__ import annotations

import math
from collections import namedtuple
from collections.abc import Sequence
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from flash_attn._errors import InvalidArgument, NotServed
from flash_attn.models._formats import remap_of
from flash_attn.models._gpt2 import remap_state_dict_hf_gpt2, remap_state_dict_megatron
from flash_attn.models._tensor_parallel import combine_state_dicts_tp, shard_state_dict_tp
from flash_attn.models._weights import padded_size
from flash_attn.models.llama import remap_state_dict_hf_llama
from flash_attn.modules.block import Block, ParallelBlock
from flash_attn.modules.embedding import GPT2Embeddings, ParallelGPT2Embeddings
from flash_attn.modules.mha import MHA, ParallelMHA
from flash_attn.modules.mlp import FusedMLP, GatedMlp, Mlp, ParallelFusedMLP, ParallelGatedMlp, ParallelMLP
from flash_attn.ops.activations import sqrelu_fwd
from flash_attn.ops.fused_dense import ColumnParallelLinear
from flash_attn.ops.triton.layer_norm import RMSNorm, layer_norm_fn
from flash_attn.ops.triton.mlp import FusedDenseSqreluDense
from flash_attn.utils.distributed import all_gather, all_gather_raw, sync_shared_params
from flash_attn.utils.generation import GenerationMixin
from flash_attn.utils.pretrained import state_dict_from_pretrained

__all__ = [
    "GPTLMHeadModel",
    "GPTModel",
    "GPTPreTrainedModel",
    "combine_state_dicts_tp",
    "create_block",
    "create_mixer_cls",
    "create_mlp_cls",
    "remap_state_dict_hf_gpt2",
    "remap_state_dict_hf_llama",
    "remap_state_dict_megatron",
    "shard_state_dict_tp",
]

_TANH_GELUS = ("gelu_new", "gelu_fast", "gelu_approx", "gelu_pytorch_tanh")
_GATED = {"glu": F.sigmoid, "swiglu": F.silu, "geglu": F.gelu}
_ACTIVATIONS = {
    "gelu": F.gelu,
    **dict.fromkeys(_TANH_GELUS, partial(F.gelu, approximate="tanh")),
    "relu": F.relu,
    "sqrelu": sqrelu_fwd,
}

CausalLMOutput = namedtuple("CausalLMOutput", ["logits"])


def _of_group(config, process_group) -> dict:
    if process_group is None:
        return {}
    return {"process_group": process_group, "sequence_parallel": getattr(config, "sequence_parallel", True)}


def create_mixer_cls(config, layer_idx=None, process_group=None, device=None, dtype=None):
    """-> what makes the attention layer of a width."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    softmax_scale = 1.0
    if config.scale_attn_weights:
        softmax_scale = head_dim ** (-1.0 if getattr(config, "mup_scale_qk_dot_by_d", False) else -0.5)
    softmax_scale *= getattr(config, "mup_attn_multiplier", 1.0)
    if config.scale_attn_by_inverse_layer_idx:
        softmax_scale /= layer_idx + 1
    dwconv = getattr(config, "attn_dwconv", False)
    if process_group is not None and dwconv:
        raise NotServed("attn_dwconv: not split over processes; expected False with a process_group")
    own = {"fused_bias_fc": getattr(config, "fused_bias_fc", False), "dwconv": dwconv}
    return partial(
        MHA if process_group is None else ParallelMHA,
        num_heads=config.num_attention_heads,
        num_heads_kv=getattr(config, "n_head_kv", None),
        qkv_proj_bias=getattr(config, "qkv_proj_bias", True),
        out_proj_bias=getattr(config, "out_proj_bias", True),
        dropout=config.attn_pdrop,
        softmax_scale=softmax_scale,
        causal=True,
        layer_idx=layer_idx,
        rotary_emb_dim=int(getattr(config, "rotary_emb_fraction", 0.0) * head_dim),
        rotary_emb_base=getattr(config, "rotary_emb_base", 10000.0),
        rotary_emb_scale_base=getattr(config, "rotary_emb_scale_base", None),
        rotary_emb_interleaved=getattr(config, "rotary_emb_interleaved", False),
        use_alibi=getattr(config, "use_alibi", False),
        window_size=tuple(getattr(config, "window_size", (-1, -1))),
        use_flash_attn=getattr(config, "use_flash_attn", False),
        **(own if process_group is None else _of_group(config, process_group)),
        device=device,
        dtype=dtype,
    )


def create_mlp_cls(config, layer_idx=None, process_group=None, device=None, dtype=None):
    """-> what makes the feed-forward layer of a width."""
    name = config.activation_function
    common = dict(_of_group(config, process_group), hidden_features=config.n_inner, device=device, dtype=dtype)
    biases = {f"bias{i}": getattr(config, f"mlp_fc{i}_bias", True) for i in (1, 2)}
    checkpoint_lvl = getattr(config, "mlp_checkpoint_lvl", 0)
    if isinstance(checkpoint_lvl, Sequence):  # one for each layer
        checkpoint_lvl = checkpoint_lvl[layer_idx]
    if getattr(config, "fused_dense_sqrelu_dense", False):
        if name != "sqrelu" or process_group is not None:
            raise NotServed("fused_dense_sqrelu_dense: needs activation_function='sqrelu', and no process_group")
        return partial(FusedDenseSqreluDense, checkpoint_lvl=checkpoint_lvl, **common)
    if getattr(config, "fused_mlp", False):
        activation = "gelu_approx" if name in _TANH_GELUS else name
        mlp = FusedMLP if process_group is None else ParallelFusedMLP
        return partial(mlp, activation=activation, checkpoint_lvl=checkpoint_lvl, **biases, **common)
    if name in _GATED:
        multiple_of = getattr(config, "mlp_multiple_of", 128)
        mlp = GatedMlp if process_group is None else ParallelGatedMlp
        return partial(mlp, activation=_GATED[name], multiple_of=multiple_of, **biases, **common)
    if name not in _ACTIVATIONS:
        known = ", ".join([*_ACTIVATIONS, *_GATED])
        raise InvalidArgument(f"activation_function: expected one of {known}, got {name!r}")
    mlp = Mlp if process_group is None else ParallelMLP
    return partial(mlp, activation=_ACTIVATIONS[name], **biases, **common)


def _norm_cls(config, device, dtype):
    norm = RMSNorm if getattr(config, "rms_norm", False) else nn.LayerNorm
    return partial(norm, eps=config.layer_norm_epsilon, device=device, dtype=dtype)


def create_block(config, layer_idx=None, process_group=None, device=None, dtype=None):
    """-> the layer of that number."""
    kind = {"device": device, "dtype": dtype}
    options = dict(
        mixer_cls=create_mixer_cls(config, layer_idx, process_group, **kind),
        mlp_cls=create_mlp_cls(config, layer_idx, process_group, **kind),
        norm_cls=_norm_cls(config, device, dtype),
        resid_dropout1=config.embd_pdrop if layer_idx == 0 else config.resid_pdrop,
        resid_dropout2=config.resid_pdrop,
        fused_dropout_add_ln=getattr(config, "fused_dropout_add_ln", False),
        residual_in_fp32=getattr(config, "residual_in_fp32", False),
        sequence_parallel=process_group is not None and getattr(config, "sequence_parallel", True),
        mark_shared_params=process_group is not None,
    )
    prenorm = getattr(config, "prenorm", True)
    if not getattr(config, "parallel_block", False):
        block = Block(config.hidden_size, prenorm=prenorm, **options)
    elif prenorm:
        tied_norm = getattr(config, "parallel_block_tied_norm", False)
        block = ParallelBlock(config.hidden_size, tied_norm=tied_norm, **options)
    else:
        raise InvalidArgument("parallel_block: needs prenorm=True")
    block.layer_idx = layer_idx
    return block


def _init_weights(module, n_layer, initializer_range=0.02, mup_width_scale=1.0, rescale_prenorm_residual=True):
    """GPT-2's (Radford et al., 2019): normal, and smaller by sqrt(2 n_layer) where a layer adds to the residual."""
    std = initializer_range * math.sqrt(mup_width_scale)
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=std)
        module.weight._optim = {**getattr(module.weight, "_optim", {}), "lr_multiplier": mup_width_scale}
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=initializer_range)
    if rescale_prenorm_residual:
        for name, p in module.named_parameters():
            if name in ("out_proj.weight", "fc2.weight"):
                nn.init.normal_(p, std=std / math.sqrt(2 * n_layer))


class GPTPreTrainedModel(nn.Module):
    def __init__(self, config, *inputs, **kwargs):
        super().__init__()
        self.config = config

    @classmethod
    def from_pretrained(
        cls, model_name, config, *args, strict=True, device=None, dtype=None, world_size=1, rank=0, **kwargs
    ):
        """The model with a checkpoint's weights, whose names say whose they are: GPT-2's, or those that a module here
        renames. model_name: a folder or a name (see utils.pretrained). world_size, rank: this process's part."""
        model = cls(config, *args, device=device, dtype=dtype, **kwargs)
        weights = state_dict_from_pretrained(model_name, device="cpu", dtype=dtype)
        weights = remap_of(weights, model_name)(weights, config)
        if world_size > 1:
            weights = shard_state_dict_tp(weights, config, world_size, rank)
        model.load_state_dict(weights, strict=strict)
        return model

    def _initialize(self) -> None:
        config = self.config
        self.apply(
            partial(
                _init_weights,
                n_layer=config.num_hidden_layers,
                initializer_range=config.initializer_range,
                mup_width_scale=getattr(config, "mup_width_scale", 1.0),
            )
        )
        self.tie_weights()


class GPTModel(GPTPreTrainedModel):
    """Embeddings, blocks, and a last norm. process_group: split over its processes."""

    def __init__(self, config, process_group=None, device=None, dtype=None):
        super().__init__(config)
        kind = {"device": device, "dtype": dtype}
        self.process_group = process_group
        self.sequence_parallel = getattr(config, "sequence_parallel", True)
        self.embeddings_multiplier = getattr(config, "mup_embeddings_multiplier", 1.0)
        self.residual_in_fp32 = getattr(config, "residual_in_fp32", False)
        self.prenorm = getattr(config, "prenorm", True)
        self.parallel_block = getattr(config, "parallel_block", False)
        self.fused_dropout_add_ln = getattr(config, "fused_dropout_add_ln", False)

        sizes = config.hidden_size, padded_size(config.vocab_size, config), config.max_position_embeddings
        if process_group is None:
            projected = getattr(config, "word_embed_proj_dim", None)
            self.embeddings = GPT2Embeddings(*sizes, word_embed_proj_dim=projected, **kind)
        else:
            self.embeddings = ParallelGPT2Embeddings(*sizes, **_of_group(config, process_group), **kind)
        self.layers = nn.ModuleList(
            [create_block(config, i, process_group, **kind) for i in range(config.num_hidden_layers)]
        )
        if getattr(config, "rotary_emb_fraction", 0.0) > 0.0:  # one table of angles for all layers
            for layer in self.layers[1:]:
                layer.mixer.rotary_emb = self.layers[0].mixer.rotary_emb
        if self.prenorm:
            self.drop_f = nn.Dropout(config.resid_pdrop)
            self.ln_f = _norm_cls(config, device, dtype)(config.hidden_size)
            if process_group is not None:
                for p in self.ln_f.parameters():
                    p._shared_params = True
                    if self.sequence_parallel:
                        p._sequence_parallel = True
        self._initialize()

    def tie_weights(self):
        if self.process_group is not None:
            sync_shared_params(self, self.process_group)

    def allocate_inference_cache(self, batch_size, max_seqlen, dtype=None, **kwargs):
        """-> the caches by layer, for InferenceParams.key_value_memory_dict."""
        return {
            i: layer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)
            for i, layer in enumerate(self.layers)
        }

    def forward(self, input_ids, position_ids=None, inference_params=None):
        """input_ids, position_ids (batch, seqlen) -> (batch, seqlen, hidden_size); with sequence parallelism this
        process's part of (batch * seqlen, hidden_size). inference_params: see modules.mha.MHA."""
        mixer_kwargs, flattened = {}, {}
        if self.process_group is not None and self.sequence_parallel:
            mixer_kwargs, flattened = {"seqlen": input_ids.shape[1]}, {"combine_batch_seqlen_dim": True}
        if inference_params is not None:
            mixer_kwargs["inference_params"] = inference_params
        x = self.embeddings(input_ids, position_ids=position_ids, **flattened)
        if self.embeddings_multiplier != 1.0:
            x = x * self.embeddings_multiplier
        second = residual = None
        for layer in self.layers:
            if not self.prenorm:
                x = layer(x, mixer_kwargs=mixer_kwargs)
            elif self.parallel_block:
                x, second, residual = layer(x, second, residual, mixer_kwargs=mixer_kwargs)
            else:
                x, residual = layer(x, residual, mixer_kwargs=mixer_kwargs)
        return self._last_norm(x, second, residual) if self.prenorm else x

    def _last_norm(self, x: Tensor, second: Tensor | None, residual: Tensor | None) -> Tensor:
        if self.fused_dropout_add_ln:
            return layer_norm_fn(
                x,
                self.ln_f.weight,
                self.ln_f.bias,
                residual=residual,
                x1=second,
                eps=self.ln_f.eps,
                dropout_p=self.drop_f.p if self.training else 0.0,
                is_rms_norm=isinstance(self.ln_f, RMSNorm),
            )
        h = self.drop_f(x)
        h = h if second is None else h + self.drop_f(second)
        h = h if residual is None else h + residual
        return self.ln_f(h.to(self.ln_f.weight.dtype))


class GPTLMHeadModel(GPTPreTrainedModel, GenerationMixin):
    """GPTModel and logits; generate() decodes."""

    def __init__(self, config, process_group=None, device=None, dtype=None):
        super().__init__(config)
        kind = {"device": device, "dtype": dtype}
        self.process_group = process_group
        self.transformer = GPTModel(config, process_group=process_group, **kind)
        self.tie_word_embeddings = getattr(config, "tie_word_embeddings", True)
        self.norm_head = getattr(config, "norm_head", False)
        self.output_scale = getattr(config, "mup_output_multiplier", 1.0) * getattr(config, "mup_width_scale", 1.0)
        projected = getattr(config, "word_embed_proj_dim", None)
        width = config.hidden_size if projected is None else projected
        self.project_out = None
        if projected is not None:
            self.project_out = nn.Linear(config.hidden_size, width, bias=False, **kind)
        vocab_size, bias = padded_size(config.vocab_size, config), getattr(config, "lm_head_bias", False)
        if process_group is None:
            self.lm_head = nn.Linear(width, vocab_size, bias=bias, **kind)
        else:
            self.lm_head = ColumnParallelLinear(
                width, vocab_size, bias=bias, **_of_group(config, process_group), **kind
            )
        self._initialize()

    def tie_weights(self):
        if self.tie_word_embeddings:
            self.lm_head.weight = self.transformer.embeddings.word_embeddings.weight
        if self.process_group is not None:
            sync_shared_params(self, self.process_group)

    def allocate_inference_cache(self, batch_size, max_seqlen, dtype=None, **kwargs):
        """-> the caches by layer, for InferenceParams.key_value_memory_dict."""
        return self.transformer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)

    def forward(self, input_ids, position_ids=None, inference_params=None, num_last_tokens=0):
        """input_ids, position_ids (batch, seqlen) -> .logits (batch, seqlen, vocab_size), of the last num_last_tokens
        if that is above 0. With a process_group this process's part of the vocabulary, or with inference_params, which
        need sequence_parallel=False, all of it."""
        if input_ids.dim() != 2:
            raise InvalidArgument(f"input_ids: expected (batch, seqlen), got {tuple(input_ids.shape)}")
        x = self.transformer(input_ids, position_ids=position_ids, inference_params=inference_params)
        if x.dim() == 2 and (inference_params is not None or num_last_tokens > 0):
            raise NotServed("inference_params, num_last_tokens: need sequence_parallel=False in the config")
        x = x[:, -num_last_tokens:] if num_last_tokens > 0 else x
        if self.project_out is not None:
            x = self.project_out(x)
        if self.output_scale != 1.0:
            x = x * self.output_scale
        parallel = self.process_group is not None
        if not self.norm_head:
            logits = self.lm_head(x)
        else:
            if parallel and self.lm_head.sequence_parallel:
                x = all_gather(x, self.process_group)
            logits = F.linear(x, F.normalize(self.lm_head.weight), self.lm_head.bias)
        if parallel and inference_params is not None:
            logits, _ = all_gather_raw(logits, self.process_group)
            logits = logits.unflatten(0, (-1, input_ids.shape[0])).movedim(0, -2).flatten(-2)
        return CausalLMOutput(logits=logits)

    def load_state_dict(self, state_dict, strict=True, **kwargs):
        """Also takes weights from when a block's norms followed its layers (transformer.ln_0 was the first)."""
        if "transformer.ln_0.weight" in state_dict:
            n, names = len(self.transformer.layers), {"transformer.ln_0.": "transformer.layers.0.norm1."}
            for i in range(n):
                follows = f"transformer.layers.{i + 1}.norm1." if i < n - 1 else "transformer.ln_f."
                names[f"transformer.layers.{i}.norm1."] = f"transformer.layers.{i}.norm2."
                names[f"transformer.layers.{i}.norm2."] = follows
            state_dict = {
                next((new + k.removeprefix(old) for old, new in names.items() if k.startswith(old)), k): x
                for k, x in state_dict.items()
            }
        return super().load_state_dict(state_dict, strict=strict, **kwargs)
