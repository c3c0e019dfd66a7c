"""Parameters in the original's order: callers pass them by position, or look at signatures."""

from __future__ import annotations

import importlib
import inspect

import pytest

_TAIL = "device=None dtype=None"
_HEADS = (
    "qkv_proj_bias=True out_proj_bias=True dropout=0.0 softmax_scale=None causal=False layer_idx=None {} "
    "rotary_emb_dim=0 rotary_emb_base=10000.0 rotary_emb_scale_base=None rotary_emb_interleaved=False "
    "use_alibi=False window_size=(-1,-1)"
)
_INNER = "causal=False softmax_scale=None attention_dropout=0.0"
_BLOCK = "dim mixer_cls=None mlp_cls=None norm_cls dropout_cls"
_MARKS = "sequence_parallel=False mark_shared_params=False"
_SAMPLING = "top_k=1 top_p=0.0 temperature=1.0"
_DECODE = "vocab_size=None tensor_parallel=1 cg=False enable_timing=False"
_V1 = "dropout_p softmax_scale=None causal=False return_attn_probs=False deterministic=False"
_PAIR = "cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k"

NAMES = {
    "modules.mha.MHA": f"embed_dim num_heads num_heads_kv=None cross_attn=False {_HEADS.format('dwconv=False')} "
    f"fused_bias_fc=False use_flash_attn=False return_residual=False checkpointing=False {_TAIL}",
    "modules.mha.ParallelMHA": f"embed_dim num_heads process_group num_heads_kv=None {_HEADS.format('')} "
    f"use_flash_attn=False checkpointing=False sequence_parallel=True {_TAIL}",
    "modules.mha.MHA.forward": "self x x_kv=None key_padding_mask=None cu_seqlens=None max_seqlen=None "
    "mixer_subset=None inference_params=None kwargs",
    "modules.mha.FlashSelfAttention": f"{_INNER} window_size=(-1,-1) alibi_slopes=None deterministic=False",
    "modules.mha.FlashCrossAttention": f"{_INNER} alibi_slopes=None window_size=(-1,-1) deterministic=False",
    "modules.mha.FlashCrossAttention.forward": "self q kv causal=None cu_seqlens=None max_seqlen=None "
    "cu_seqlens_k=None max_seqlen_k=None",
    "modules.mha.SelfAttention": _INNER,
    "modules.mha.CrossAttention": _INNER,
    "modules.mha.CrossAttention.forward": "self q kv causal=None key_padding_mask=None",
    "modules.mha.get_alibi_slopes": "nheads",
    "modules.mha._update_kv_cache": "kv inference_params layer_idx",
    "modules.mlp.Mlp": "in_features hidden_features=None out_features=None activation bias1=True bias2=True "
    f"return_residual=False {_TAIL}",
    "modules.mlp.ParallelMLP": "in_features hidden_features=None out_features=None activation process_group=None "
    f"sequence_parallel=True bias1=True bias2=True {_TAIL}",
    "modules.mlp.GatedMlp": "in_features hidden_features=None out_features=None activation bias1=True bias2=True "
    f"multiple_of=128 return_residual=False {_TAIL}",
    "modules.mlp.ParallelGatedMlp": "in_features process_group hidden_features=None out_features=None activation "
    f"bias1=True bias2=True multiple_of=128 sequence_parallel=True {_TAIL}",
    "modules.block.Block": f"{_BLOCK} prenorm=True resid_dropout1=0.0 resid_dropout2=0.0 drop_path1=0.0 "
    f"drop_path2=0.0 fused_dropout_add_ln=False return_residual=False residual_in_fp32=False {_MARKS}",
    "modules.block.Block.forward": "self hidden_states residual=None mixer_subset=None mixer_kwargs=None",
    "modules.block.ParallelBlock": f"{_BLOCK} resid_dropout1=0.0 resid_dropout2=0.0 tied_norm=False "
    f"fused_dropout_add_ln=False residual_in_fp32=False {_MARKS}",
    "modules.embedding.GPT2Embeddings": "embed_dim vocab_size max_position_embeddings padding_idx=None "
    f"word_embed_proj_dim=None {_TAIL}",
    "modules.embedding.BertEmbeddings": "embed_dim vocab_size max_position_embeddings type_vocab_size "
    f"padding_idx=None {_TAIL}",
    "modules.embedding.ParallelGPT2Embeddings": "embed_dim vocab_size max_position_embeddings process_group "
    f"padding_idx=None sequence_parallel=True {_TAIL}",
    "utils.generation.InferenceParams": "max_seqlen max_batch_size seqlen_offset=0 batch_size_offset=0 "
    "key_value_memory_dict lengths_per_sample=None",
    "utils.generation.sample": f"logits {_SAMPLING}",
    "utils.generation.decode": f"input_ids model max_length {_SAMPLING} eos_token_id=None teacher_outputs=None "
    f"{_DECODE}",
    "utils.generation.decode_speculative": "input_ids model model_draft max_length speculative_lookahead=3 "
    f"{_SAMPLING} eos_token_id=None {_DECODE} debug=False",
    "utils.generation.update_graph_cache": "model cache batch_size seqlen_og max_seqlen decoding_seqlens=(1,) "
    "tensor_parallel=1 dtype=None n_warmups=2",
    "utils.testing.generate_random_padding_mask": "max_seqlen batch_size device mode='random' zero_lengths=False",
    "utils.testing.attention_ref": "q k v query_padding_mask=None key_padding_mask=None key_leftpad=None "
    "attn_bias=None dropout_p=0.0 dropout_mask=None causal=False qv=None q_descale=None k_descale=None "
    "v_descale=None window_size=(None,None) attention_chunk=0 sink_token_length=0 learnable_sink=None "
    "softcap=0.0 upcast=True reorder_ops=False intermediate_dtype=None",
    "utils.testing.generate_qkv": "q k v query_padding_mask=None key_padding_mask=None qv=None kvpacked=False "
    "qkvpacked=False query_unused_mask=None key_unused_mask=None",
    "utils.pretrained.state_dict_from_pretrained": "model_name device=None dtype=None",
    "flash_attn_triton.flash_attn_func": "q k v bias=None causal=False softmax_scale=None",
    "flash_attn_triton.flash_attn_kvpacked_func": "q kv bias=None causal=False softmax_scale=None",
    "flash_attn_triton.flash_attn_qkvpacked_func": "qkv bias=None causal=False softmax_scale=None",
    "flash_attn_triton_og.attention": "q k v sm_scale",
    "flash_attn_interface.flash_attn_unpadded_func": f"q k v {_PAIR} {_V1}",
    "flash_attn_interface.flash_attn_unpadded_kvpacked_func": f"q kv {_PAIR} {_V1}",
    "flash_attn_interface.flash_attn_unpadded_qkvpacked_func": f"qkv cu_seqlens max_seqlen {_V1}",
    "flash_attn_interface.flash_attn_unpadded_qkvpacked_split_func": "qkv cu_seqlens max_seqlen0 max_seqlen1 "
    f"batch_size0 {_V1}",
    "flash_attention.FlashAttention": f"softmax_scale=None attention_dropout=0.0 {_TAIL}",
    "flash_attention.FlashAttention.forward": "self qkv key_padding_mask=None causal=False cu_seqlens=None "
    "max_s=None need_weights=False",
    "flash_attention.FlashMHA": "embed_dim num_heads bias=True batch_first=True attention_dropout=0.0 causal=False "
    f"{_TAIL} kwargs",
}


@pytest.mark.parametrize("name", NAMES)
def test_signature(name):
    module, *path = name.split(".")
    if module in ("modules", "utils"):
        module = f"{module}.{path.pop(0)}"
    found = importlib.import_module(f"flash_attn.{module}")
    for part in path:
        found = getattr(found, part)
    plain = []  # defaults that are functions or classes only have to be there
    for p in inspect.signature(found).parameters.values():
        shown = isinstance(p.default, (bool, int, float, str, tuple, type(None)))
        plain.append(f"{p.name}={p.default!r}".replace(", ", ",") if shown else p.name)
    assert plain == NAMES[name].split()
