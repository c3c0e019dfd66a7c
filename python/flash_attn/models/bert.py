"""BERT (Devlin et al., arXiv 1810.04805) without padding: a BertConfig with more attributes says how.

Attributes beyond BertConfig's, with their defaults: use_flash_attn=False (drops padding before the layers), dense_seq_
output=False and last_layer_subset=False (heads, and the last layer too, see masked tokens only), fused_bias_fc,
fused_mlp, fused_dropout_add_ln, use_xentropy=False, mlp_checkpoint_lvl=0, pad_vocab_size_multiple=1, and with
position_embedding_type="rotary" rotary_emb_dim, rotary_emb_base, rotary_emb_scale_base, rotary_emb_interleaved.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions
from transformers.models.bert.modeling_bert import BertForPreTrainingOutput

from flash_attn._errors import InvalidArgument
from flash_attn.bert_padding import index_first_axis, index_first_axis_residual, pad_input, unpad_input
from flash_attn.losses.cross_entropy import CrossEntropyLoss
from flash_attn.models._weights import padded_rows, padded_size, renamed
from flash_attn.modules.block import Block
from flash_attn.modules.embedding import BertEmbeddings
from flash_attn.modules.mha import MHA
from flash_attn.modules.mlp import FusedMLP, Mlp
from flash_attn.ops.fused_dense import FusedDense
from flash_attn.utils.pretrained import state_dict_from_pretrained

__all__ = [
    "BertEncoder",
    "BertForPreTraining",
    "BertLMPredictionHead",
    "BertModel",
    "BertPooler",
    "BertPreTrainedModel",
    "BertPreTrainingHeads",
    "BertPredictionHeadTransform",
    "create_block",
    "create_mixer_cls",
    "create_mlp_cls",
    "inv_remap_state_dict",
    "remap_state_dict",
]

_TANH_GELUS = ("gelu_new", "gelu_fast", "gelu_pytorch_tanh")


def _approximate(config) -> str:
    if config.hidden_act not in ("gelu", *_TANH_GELUS):
        known = ", ".join(["gelu", *_TANH_GELUS])
        raise InvalidArgument(f"hidden_act: expected one of {known}, got {config.hidden_act!r}")
    return "tanh" if config.hidden_act in _TANH_GELUS else "none"


def _linear(config):
    return FusedDense if getattr(config, "fused_bias_fc", False) else nn.Linear


def create_mixer_cls(config, cross_attn=False, return_residual=False):
    """-> what makes the attention layer of a width."""
    rotary = {}
    if getattr(config, "position_embedding_type", "absolute") == "rotary":
        rotary = dict(
            rotary_emb_dim=getattr(config, "rotary_emb_dim", config.hidden_size // config.num_attention_heads),
            rotary_emb_base=getattr(config, "rotary_emb_base", 10000.0),
            rotary_emb_scale_base=getattr(config, "rotary_emb_scale_base", None),
            rotary_emb_interleaved=getattr(config, "rotary_emb_interleaved", False),
        )
    return partial(
        MHA,
        num_heads=config.num_attention_heads,
        cross_attn=cross_attn,
        dropout=config.attention_probs_dropout_prob,
        fused_bias_fc=getattr(config, "fused_bias_fc", False),
        use_flash_attn=getattr(config, "use_flash_attn", False),
        return_residual=return_residual,
        **rotary,
    )


def create_mlp_cls(config, layer_idx=None, return_residual=False):
    """-> what makes the feed-forward layer of a width."""
    common = dict(hidden_features=config.intermediate_size, return_residual=return_residual)
    if not getattr(config, "fused_mlp", False):
        return partial(Mlp, activation=partial(F.gelu, approximate=_approximate(config)), **common)
    if _approximate(config) != "tanh":
        raise InvalidArgument(f"fused_mlp: needs hidden_act in {', '.join(_TANH_GELUS)}")
    checkpoint_lvl = getattr(config, "mlp_checkpoint_lvl", 0)
    if isinstance(checkpoint_lvl, Sequence):  # one for each layer
        checkpoint_lvl = checkpoint_lvl[layer_idx]
    return partial(FusedMLP, checkpoint_lvl=checkpoint_lvl, **common)


def create_block(config, layer_idx=None):
    """-> the layer of that number; with last_layer_subset the last has cross-attention."""
    cross_attn = getattr(config, "last_layer_subset", False) and layer_idx == config.num_hidden_layers - 1
    return Block(
        config.hidden_size,
        create_mixer_cls(config, cross_attn, return_residual=not cross_attn),
        create_mlp_cls(config, layer_idx, return_residual=not cross_attn),
        norm_cls=partial(nn.LayerNorm, eps=config.layer_norm_eps),
        prenorm=False,
        resid_dropout1=config.hidden_dropout_prob,
        resid_dropout2=config.hidden_dropout_prob,
        fused_dropout_add_ln=getattr(config, "fused_dropout_add_ln", False),
        return_residual=not cross_attn,
    )


def _init_weights(module, initializer_range=0.02):
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=initializer_range)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
    if isinstance(module, nn.Embedding) and module.padding_idx is not None:
        nn.init.zeros_(module.weight[module.padding_idx])


class BertEncoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.use_flash_attn = getattr(config, "use_flash_attn", False)
        self.layers = nn.ModuleList([create_block(config, i) for i in range(config.num_hidden_layers)])

    def forward(self, hidden_states, key_padding_mask=None, subset_mask=None):
        """hidden_states (batch, seqlen, hidden_size), key_padding_mask (batch, seqlen) bool, True for tokens
        -> the same shape; padding gives 0 with use_flash_attn, else values that mean nothing. subset_mask (batch,
        seqlen) bool: -> the rows (n, hidden_size) of those tokens; with use_flash_attn padding is none of them."""
        x = hidden_states
        if key_padding_mask is None or not self.use_flash_attn:
            mixer_kwargs = None if key_padding_mask is None else {"key_padding_mask": key_padding_mask}
            for layer in self.layers:
                x = layer(x, mixer_kwargs=mixer_kwargs)
            return x if subset_mask is None else x[subset_mask]
        batch, seqlen = x.shape[:2]
        x, indices, cu_seqlens, max_seqlen, _ = unpad_input(x, key_padding_mask)
        mixer_kwargs = {"cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen}
        for layer in self.layers[:-1]:
            x = layer(x, mixer_kwargs=mixer_kwargs)
        last = self.layers[-1]
        if subset_mask is None:
            return pad_input(last(x, mixer_kwargs=self._of_last(mixer_kwargs, x)), indices, batch, seqlen)
        rows = subset_mask[key_padding_mask].nonzero().flatten()
        if not last.mixer.cross_attn:
            return index_first_axis(last(x, mixer_kwargs=mixer_kwargs), rows)
        lengths = (subset_mask & key_padding_mask).sum(dim=-1)
        subset, x = index_first_axis_residual(x, rows)
        asking = {"cu_seqlens": F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32), "max_seqlen": max_seqlen}
        return last(subset, mixer_kwargs={**self._of_last(mixer_kwargs, x), **asking})

    def _of_last(self, mixer_kwargs: dict, x: Tensor) -> dict:
        if not self.layers[-1].mixer.cross_attn:
            return mixer_kwargs
        of_keys = {f"{name}_k": value for name, value in mixer_kwargs.items()}
        return {**mixer_kwargs, "x_kv": x, **of_keys}


class BertPooler(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.dense = _linear(config)(config.hidden_size, config.hidden_size)
        self.activation = nn.Tanh()

    def forward(self, hidden_states, pool=True):
        """(batch, seqlen, hidden_size), or without pool the first tokens alone -> (batch, hidden_size)."""
        return self.activation(self.dense(hidden_states[:, 0] if pool else hidden_states))


class BertPredictionHeadTransform(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.dense = _linear(config)(config.hidden_size, config.hidden_size)
        self.transform_act_fn = nn.GELU(approximate=_approximate(config))
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.layer_norm(self.transform_act_fn(self.dense(hidden_states)))


class BertLMPredictionHead(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.transform = BertPredictionHeadTransform(config)
        self.decoder = _linear(config)(config.hidden_size, padded_size(config.vocab_size, config), bias=True)

    def forward(self, hidden_states):
        return self.decoder(self.transform(hidden_states))


class BertPreTrainingHeads(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.predictions = BertLMPredictionHead(config)
        self.seq_relationship = nn.Linear(config.hidden_size, 2)

    def forward(self, sequence_output, pooled_output):
        return self.predictions(sequence_output), self.seq_relationship(pooled_output)


class BertPreTrainedModel(nn.Module):
    def __init__(self, config, *inputs, **kwargs):
        super().__init__()
        self.config = config

    @classmethod
    def from_pretrained(cls, model_name, config, *inputs, **kwargs):
        """The model with the weights of transformers' BertForPreTraining, from a folder or the hub."""
        model = cls(config, *inputs, **kwargs)
        weights = remap_state_dict(state_dict_from_pretrained(model_name), config)
        if isinstance(model, BertModel):
            weights = {name.removeprefix("bert."): x for name, x in weights.items() if name.startswith("bert.")}
        model.load_state_dict(weights, strict=False)
        return model


class BertModel(BertPreTrainedModel):
    def __init__(self, config, add_pooling_layer=True):
        super().__init__(config)
        self.embeddings = BertEmbeddings(
            config.hidden_size,
            padded_size(config.vocab_size, config),
            config.max_position_embeddings,
            config.type_vocab_size,
            padding_idx=config.pad_token_id,
        )
        self.emb_drop = nn.Dropout(config.hidden_dropout_prob)
        self.emb_ln = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.encoder = BertEncoder(config)
        self.pooler = BertPooler(config) if add_pooling_layer else None
        self.apply(partial(_init_weights, initializer_range=config.initializer_range))

    def forward(
        self,
        input_ids,
        position_ids=None,
        token_type_ids=None,
        attention_mask=None,
        masked_tokens_mask=None,
    ):
        """input_ids, position_ids, token_type_ids (batch, seqlen); attention_mask (batch, seqlen), True for tokens
        -> last_hidden_state (batch, seqlen, hidden_size), pooler_output (batch, hidden_size).

        masked_tokens_mask (batch, seqlen) bool: last_hidden_state has the rows (n, hidden_size) of those tokens alone.
        """
        mask = None if attention_mask is None else attention_mask.bool()
        x = self.embeddings(input_ids, position_ids=position_ids, token_type_ids=token_type_ids)
        x = self.emb_drop(self.emb_ln(x))
        if masked_tokens_mask is None:
            x = self.encoder(x, key_padding_mask=mask)
            pooled = None if self.pooler is None else self.pooler(x)
        else:
            first = torch.zeros_like(masked_tokens_mask)
            first[:, 0] = True
            subset = masked_tokens_mask | first
            x = self.encoder(x, key_padding_mask=mask, subset_mask=subset)
            if mask is not None and self.encoder.use_flash_attn:
                subset = subset & mask
            pooled = None if self.pooler is None else self.pooler(x[first[subset]], pool=False)
            x = x[masked_tokens_mask[subset]]
        return BaseModelOutputWithPoolingAndCrossAttentions(last_hidden_state=x, pooler_output=pooled)


class BertForPreTraining(BertPreTrainedModel):
    """Masked language model and next sentence prediction."""

    def __init__(self, config):
        super().__init__(config)
        self.dense_seq_output = getattr(config, "dense_seq_output", False)
        self.last_layer_subset = getattr(config, "last_layer_subset", False)
        if self.last_layer_subset and not self.dense_seq_output:
            raise InvalidArgument("last_layer_subset: needs dense_seq_output=True")
        loss = nn.CrossEntropyLoss
        if getattr(config, "use_xentropy", False):
            loss = partial(CrossEntropyLoss, inplace_backward=True)
        self.bert = BertModel(config)
        self.cls = BertPreTrainingHeads(config)
        self.mlm_loss, self.nsp_loss = loss(ignore_index=0), loss(ignore_index=-1)
        self.apply(partial(_init_weights, initializer_range=config.initializer_range))
        self.tie_weights()

    def tie_weights(self):
        self.cls.predictions.decoder.weight = self.bert.embeddings.word_embeddings.weight

    def forward(
        self,
        input_ids,
        position_ids=None,
        token_type_ids=None,
        attention_mask=None,
        labels=None,
        next_sentence_label=None,
    ):
        """-> loss (with labels and next_sentence_label), prediction_logits (batch, seqlen, vocab_size),
        seq_relationship_logits (batch, 2). labels (batch, seqlen): 0 where nothing is to be predicted, as for padding.
        With dense_seq_output and labels, prediction_logits are of the tokens to predict alone, (n, vocab_size)."""
        wanted = None if labels is None else labels > 0
        outputs = self.bert(
            input_ids,
            position_ids=position_ids,
            token_type_ids=token_type_ids,
            attention_mask=attention_mask,
            masked_tokens_mask=wanted if self.last_layer_subset else None,
        )
        x = outputs.last_hidden_state
        dense = self.dense_seq_output and labels is not None
        if dense and not self.last_layer_subset:
            x = index_first_axis(x.flatten(0, 1), wanted.flatten().nonzero().flatten())
        scores, relationship = self.cls(x, outputs.pooler_output)
        loss = None
        if labels is not None and next_sentence_label is not None:
            targets = labels[wanted] if dense else labels.flatten()
            of_words = self.mlm_loss(scores if dense else scores.flatten(0, 1), targets)
            of_sentences = self.nsp_loss(relationship.view(-1, 2), next_sentence_label.flatten())
            loss = of_words.float() + of_sentences.float()
        return BertForPreTrainingOutput(loss=loss, prediction_logits=scores, seq_relationship_logits=relationship)


_LAYERS = r"bert.encoder.layers.\1."


def _projections(config, i: int) -> dict[str, list[str]]:
    """What the attention's projections of layer i are made of."""
    if getattr(config, "last_layer_subset", False) and i == config.num_hidden_layers - 1:
        return {"Wq": ["query"], "Wkv": ["key", "value"]}
    return {"Wqkv": ["query", "key", "value"]}


def remap_state_dict(state_dict: dict[str, Tensor], config) -> dict[str, Tensor]:
    """transformers' BertForPreTraining names -> those here. Its heads may be missing."""
    weights = renamed(
        state_dict,
        (r"(.*)LayerNorm\.gamma$", r"\1LayerNorm.weight"),
        (r"(.*)LayerNorm\.beta$", r"\1LayerNorm.bias"),
        (r"bert\.encoder\.layer\.", "bert.encoder.layers."),
        (r"bert\.embeddings\.LayerNorm\.", "bert.emb_ln."),
        (r"bert\.encoder\.layers\.(\d+)\.attention\.output\.LayerNorm\.", _LAYERS + "norm1."),
        (r"bert\.encoder\.layers\.(\d+)\.output\.LayerNorm\.", _LAYERS + "norm2."),
        (r"bert\.encoder\.layers\.(\d+)\.intermediate\.dense\.", _LAYERS + "mlp.fc1."),
        (r"bert\.encoder\.layers\.(\d+)\.output\.dense\.", _LAYERS + "mlp.fc2."),
        (r"bert\.encoder\.layers\.(\d+)\.attention\.output\.dense\.", _LAYERS + "mixer.out_proj."),
        (r"cls\.predictions\.transform\.LayerNorm\.", "cls.predictions.transform.layer_norm."),
        (r"cls\.predictions\.bias$", "cls.predictions.decoder.bias"),
    )
    weights.pop("bert.embeddings.position_ids", None)
    for i in range(config.num_hidden_layers):
        layer = f"bert.encoder.layers.{i}"
        for into, parts in _projections(config, i).items():
            for kind in ("weight", "bias"):
                pieces = [weights.pop(f"{layer}.attention.self.{part}.{kind}") for part in parts]
                weights[f"{layer}.mixer.{into}.{kind}"] = torch.cat(pieces)
    words, head = "bert.embeddings.word_embeddings.weight", "cls.predictions.decoder"
    rows = padded_size(config.vocab_size, config)
    weights[words] = padded_rows(weights[words], rows)
    if any(name.startswith("cls.predictions.") for name in weights):
        weights[f"{head}.weight"] = padded_rows(weights.get(f"{head}.weight", weights[words]), rows)
        # Padding is not to be predicted.
        weights[f"{head}.bias"] = padded_rows(weights[f"{head}.bias"], rows, value=-100.0)
    return weights


def inv_remap_state_dict(state_dict: dict[str, Tensor], config) -> dict[str, Tensor]:
    """The way back, to the names of today's transformers (LayerNorm.weight, not gamma) and config.vocab_size rows."""
    weights = dict(state_dict)
    n = getattr(config, "orig_vocab_size", config.vocab_size)
    for name in ("bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight",
                 "cls.predictions.decoder.bias"):  # fmt: skip
        if name in weights:
            weights[name] = weights[name][:n]
    for i in range(config.num_hidden_layers):
        layer = f"bert.encoder.layers.{i}"
        for into, parts in _projections(config, i).items():
            for kind in ("weight", "bias"):
                pieces = weights.pop(f"{layer}.mixer.{into}.{kind}").chunk(len(parts))
                for part, piece in zip(parts, pieces, strict=True):
                    weights[f"{layer}.attention.self.{part}.{kind}"] = piece
    theirs = r"bert.encoder.layer.\1."
    return renamed(
        weights,
        (r"bert\.emb_ln\.", "bert.embeddings.LayerNorm."),
        (r"bert\.encoder\.layers\.(\d+)\.norm1\.", theirs + "attention.output.LayerNorm."),
        (r"bert\.encoder\.layers\.(\d+)\.norm2\.", theirs + "output.LayerNorm."),
        (r"bert\.encoder\.layers\.(\d+)\.mlp\.fc1\.", theirs + "intermediate.dense."),
        (r"bert\.encoder\.layers\.(\d+)\.mlp\.fc2\.", theirs + "output.dense."),
        (r"bert\.encoder\.layers\.(\d+)\.mixer\.out_proj\.", theirs + "attention.output.dense."),
        (r"bert\.encoder\.layers\.(\d+)\.attention\.self\.", theirs + "attention.self."),
        (r"cls\.predictions\.transform\.layer_norm\.", "cls.predictions.transform.LayerNorm."),
        (r"cls\.predictions\.decoder\.bias$", "cls.predictions.bias"),
    )
