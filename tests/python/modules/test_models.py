"""Models against transformers' with the same random weights: logits, greedy tokens, names of weights."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from modules.formula import close

transformers = pytest.importorskip("transformers")

from flash_attn.models import bert, gpt, llama  # noqa: E402
from flash_attn.models.vit import VisionTransformer  # noqa: E402

pytestmark = pytest.mark.device

VOCAB = 61


def randomized(model: torch.nn.Module, std: float = 0.15):
    """Weights large enough that layers matter, and logits without ties."""
    for p in model.parameters():
        torch.nn.init.normal_(p, std=std)
    return model.eval()


def gpt2(**options):
    config = transformers.GPT2Config(vocab_size=VOCAB, n_positions=40, n_embd=32, n_layer=2, n_head=4,
                                     bos_token_id=None, eos_token_id=None, **options)  # fmt: skip
    config._attn_implementation = "eager"  # others lack scale_attn_by_inverse_layer_idx (4.57)
    theirs = randomized(transformers.GPT2LMHeadModel(config))
    for name, value in options.items():
        setattr(config, name, value)
    return theirs, config, gpt.remap_state_dict_hf_gpt2


def llama2(**options):
    config = transformers.LlamaConfig(vocab_size=VOCAB, hidden_size=32, intermediate_size=60, num_hidden_layers=2,
                                      num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
                                      rope_theta=500.0, bos_token_id=None, eos_token_id=None, **options)  # fmt: skip
    theirs = randomized(transformers.LlamaForCausalLM(config))
    return theirs, llama.llama_config_to_gpt2_config(config), llama.remap_state_dict_hf_llama


DECODERS = {
    "gpt2": gpt2,
    "gpt2, an output of its own": partial(gpt2, tie_word_embeddings=False),
    "gpt2, scaled by layer, padded": partial(gpt2, scale_attn_by_inverse_layer_idx=True, pad_vocab_size_multiple=8),
    "llama": llama2,
    "llama, tied, biases": partial(llama2, tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
}


@pytest.mark.parametrize("kernels", [{}, dict(use_flash_attn=True), dict(use_flash_attn=True, fused_mlp=True,
                                     fused_dropout_add_ln=True, fused_bias_fc=True, residual_in_fp32=True)],
                         ids=["plain", "flash", "fused"])  # fmt: skip
@pytest.mark.parametrize("name", DECODERS)
def test_decoder(name, kernels):
    theirs, config, remap = DECODERS[name]()
    for option, value in kernels.items():
        if option != "fused_mlp" or name.startswith("gpt2"):
            setattr(config, option, value)
    ours = gpt.GPTLMHeadModel(config).eval()
    ours.load_state_dict(remap(theirs.state_dict(), config))
    ids = torch.randint(0, VOCAB, (2, 9))
    exact = theirs.double()(ids).logits
    close(ours(ids).logits[..., :VOCAB], exact, bound=1e-5)
    close(ours(ids, num_last_tokens=2).logits[..., :VOCAB], exact[:, -2:], bound=1e-5)
    tokens = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_length=20, do_sample=False, pad_token_id=0)
    assert ours.generate(ids, max_length=20, vocab_size=VOCAB).equal(tokens)


def test_llama_and_back():
    theirs, config, remap = llama2()
    weights = theirs.state_dict()
    back = llama.inv_remap_state_dict_hf_llama(remap(weights, config), config)
    assert set(back) == set(weights) and all(back[name].equal(x) for name, x in weights.items())
    # Meta's names: pairs as they are here.
    ours = remap(weights, config)
    meta = {"tok_embeddings.weight": weights["model.embed_tokens.weight"], "norm.weight": weights["model.norm.weight"],
            "output.weight": weights["lm_head.weight"], "rope.freqs": torch.zeros(1)}  # fmt: skip
    for i in range(2):
        layer = f"transformer.layers.{i}"
        q, k, v = ours[f"{layer}.mixer.Wqkv.weight"].split([32, 16, 16])
        w3, w1 = ours[f"{layer}.mlp.fc1.weight"].chunk(2)
        named = {"attention.wq": q, "attention.wk": k, "attention.wv": v, "feed_forward.w1": w1, "feed_forward.w3": w3}
        for old, new in (("attention.wo", "mixer.out_proj"), ("feed_forward.w2", "mlp.fc2"),
                         ("attention_norm", "norm1"), ("ffn_norm", "norm2")):  # fmt: skip
            named[old] = ours[f"{layer}.{new}.weight"]
        meta |= {f"layers.{i}.{name}.weight": x for name, x in named.items()}
    from_meta = llama.remap_state_dict_meta_llama(meta, config)
    assert set(from_meta) == set(ours) and all(from_meta[name].equal(x) for name, x in ours.items())


def test_llama_configurations(tmp_path):
    (tmp_path / "7B").mkdir()
    params = '{"dim": 4096, "n_heads": 32, "n_layers": 2, "norm_eps": 1e-06, "multiple_of": 256, "rope_theta": 1e6}'
    (tmp_path / "7B" / "params.json").write_text(params)
    config = llama.config_from_checkpoint(tmp_path, "7B")
    assert config.intermediate_size == 11008 and config.vocab_size == 32000
    assert llama.llama_config_to_gpt2_config(config).rotary_emb_base == 1e6
    torch.save({"w": torch.ones(2)}, tmp_path / "7B" / "consolidated.00.pth")
    assert [list(s) for s in llama.state_dicts_from_checkpoint(tmp_path, "7B")] == [["w"]]
    scaled = transformers.LlamaConfig(rope_scaling={"rope_type": "linear", "factor": 2.0})
    with pytest.raises(NotImplementedError, match="positions scaled by 'linear'"):
        llama.llama_config_to_gpt2_config(scaled)


def test_from_pretrained(tmp_path):
    theirs, config, _ = gpt2()
    theirs.save_pretrained(tmp_path / "whole")
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    ids = torch.randint(0, VOCAB, (1, 5))
    exact = theirs(ids).logits.double()
    for folder in ("whole", "shards", "."):
        close(gpt.GPTLMHeadModel.from_pretrained(tmp_path / folder, config).eval()(ids).logits, exact, bound=1e-5)
    (tmp_path / "empty").mkdir()
    with pytest.raises(OSError, match="has none of model.safetensors"):
        gpt.GPTLMHeadModel.from_pretrained(tmp_path / "empty", config)


def bert_config(**options):
    config = transformers.BertConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                                     intermediate_size=48, max_position_embeddings=16)  # fmt: skip
    for name, value in options.items():
        setattr(config, name, value)
    return config


@pytest.mark.parametrize("options", [{}, dict(use_flash_attn=True), dict(use_flash_attn=True, fused_bias_fc=True,
                                     fused_dropout_add_ln=True, pad_vocab_size_multiple=8)],
                         ids=["masked", "packed", "fused"])  # fmt: skip
def test_bert(options):
    config = bert_config(**options)
    theirs = randomized(transformers.BertForPreTraining(config))
    ours = bert.BertForPreTraining(config).eval()
    weights = bert.remap_state_dict(theirs.state_dict(), config)
    ours.load_state_dict(weights)
    ids, types = torch.randint(1, VOCAB, (3, 9)), torch.randint(0, 2, (3, 9))
    mask = (torch.arange(9) < torch.tensor([9, 4, 1])[:, None]).long()
    exact = theirs.double()(ids, attention_mask=mask, token_type_ids=types)
    out = ours(ids, attention_mask=mask, token_type_ids=types)
    close(out.prediction_logits[..., :VOCAB][mask == 1], exact.prediction_logits[mask == 1], bound=1e-5)
    close(out.seq_relationship_logits, exact.seq_relationship_logits, bound=1e-5)
    back = bert.inv_remap_state_dict(ours.state_dict(), config)
    theirs = theirs.float().state_dict()
    assert set(theirs) - {"cls.predictions.decoder.bias"} == set(back)
    assert all(back[name].equal(theirs[name]) for name in back)


@pytest.mark.parametrize("use_flash_attn", [False, True])
def test_bert_predicts_masked_tokens_only(use_flash_attn):
    """dense_seq_output and last_layer_subset: fewer rows, the same loss and gradients."""
    losses, grads = [], []
    whole = bert.BertForPreTraining(bert_config(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
    theirs = bert.inv_remap_state_dict(randomized(whole).state_dict(), whole.config)
    ids = torch.randint(1, VOCAB, (3, 9))
    mask = torch.arange(9) < torch.tensor([9, 4, 6])[:, None]
    labels = torch.randint(1, VOCAB, (3, 9)) * (torch.rand(3, 9) < 0.5) * mask
    for subset in ({}, dict(dense_seq_output=True), dict(dense_seq_output=True, last_layer_subset=True),
                   dict(use_xentropy=True)):  # fmt: skip
        config = bert_config(use_flash_attn=use_flash_attn, **subset)
        model = bert.BertForPreTraining(config).eval()
        model.load_state_dict(bert.remap_state_dict(theirs, config))
        out = model(ids, attention_mask=mask, labels=labels, next_sentence_label=torch.tensor([0, 1, 1]))
        if subset.get("dense_seq_output"):
            assert out.prediction_logits.shape == (int((labels > 0).sum()), VOCAB)
        losses.append(out.loss.detach().double())
        grads.append(torch.autograd.grad(out.loss, model.bert.embeddings.word_embeddings.weight)[0])
    for loss, grad in zip(losses, grads, strict=True):
        close(loss, losses[0], bound=2e-6)
        close(grad, grads[0].double(), bound=1e-5)


def test_bert_of_some_tokens():
    """Packed, padding is none of them."""
    model = randomized(bert.BertModel(bert_config(use_flash_attn=True, last_layer_subset=True)))
    ids, mask = torch.randint(1, VOCAB, (2, 6)), torch.arange(6) < torch.tensor([6, 3])[:, None]
    some = torch.tensor([[0, 1, 0, 0, 1, 0], [1, 0, 1, 0, 1, 1]]).bool()
    whole, part = model(ids, attention_mask=mask), model(ids, attention_mask=mask, masked_tokens_mask=some)
    close(part.last_hidden_state, whole.last_hidden_state[some & mask].double(), bound=1e-5)
    close(part.pooler_output, whole.pooler_output.double(), bound=1e-5)


def test_bert_with_rotary_positions_packs():
    outs = []
    for use_flash_attn in (False, True):
        torch.manual_seed(0)
        config = bert_config(use_flash_attn=use_flash_attn, position_embedding_type="rotary")
        model = randomized(bert.BertModel(config))
        ids, mask = torch.randint(1, VOCAB, (2, 9)), torch.arange(9) < torch.tensor([9, 4])[:, None]
        outs.append(model(ids, attention_mask=mask).last_hidden_state[mask])
    close(outs[1], outs[0].double(), bound=1e-5)


@pytest.mark.parametrize("options", [{}, dict(use_flash_attn=True, fused_bias_fc=True, fused_dropout_add_ln=True)])
def test_vit(options):
    config = transformers.ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
                                    image_size=16, patch_size=4, num_labels=7, layer_norm_eps=1e-6)  # fmt: skip
    theirs = randomized(transformers.ViTForImageClassification(config))
    theirs_weights = {name.removeprefix("vit."): x for name, x in theirs.state_dict().items()}

    def of(*names):
        return next(theirs_weights[name] for name in names if name in theirs_weights)

    # timm's names, which load_state_dict takes.
    weights = {"cls_token": of("embeddings.cls_token"), "pos_embed": of("embeddings.position_embeddings"),
               "patch_embed.proj.weight": of("embeddings.patch_embeddings.projection.weight"),
               "patch_embed.proj.bias": of("embeddings.patch_embeddings.projection.bias")}  # fmt: skip
    for kind in ("weight", "bias"):
        weights[f"norm.{kind}"], weights[f"head.{kind}"] = of(f"layernorm.{kind}"), of(f"classifier.{kind}")
        for i in range(2):
            old, older, new = f"layers.{i}", f"encoder.layer.{i}", f"blocks.{i}"
            qkv = [of(f"{old}.attention.{x[0]}_proj.{kind}", f"{older}.attention.attention.{x}.{kind}")
                   for x in ("query", "key", "value")]  # fmt: skip
            weights[f"{new}.attn.qkv.{kind}"] = torch.cat(qkv)
            weights[f"{new}.attn.proj.{kind}"] = of(
                f"{old}.attention.o_proj.{kind}", f"{older}.attention.output.dense.{kind}"
            )
            for a, b, c in (
                ("norm1", "layernorm_before", "layernorm_before"),
                ("norm2", "layernorm_after", "layernorm_after"),
                ("mlp.fc1", "mlp.fc1", "intermediate.dense"),
                ("mlp.fc2", "mlp.fc2", "output.dense"),
            ):
                weights[f"{new}.{a}.{kind}"] = of(f"{old}.{b}.{kind}", f"{older}.{c}.{kind}")
    ours = VisionTransformer(img_size=16, patch_size=4, num_classes=7, embed_dim=32, depth=2, num_heads=4,
                             mlp_ratio=2.0, **options).eval()  # fmt: skip
    ours.load_state_dict(weights)
    x = torch.randn(2, 3, 16, 16)
    close(ours(x), theirs.double()(x.double()).logits, bound=1e-5)
    close(ours.forward_features(x)[:, :1], ours.forward_features(x, all_tokens=False).double(), bound=1e-5)
    ours.load_state_dict(ours.state_dict())
    with pytest.raises(NotImplementedError, match="global_pool: expected 'token', got 'avg'"):
        VisionTransformer(global_pool="avg")


def test_names_in_a_state_dict():
    """What checkpoints of the original have."""
    ours = gpt.GPTLMHeadModel(transformers.GPT2Config(vocab_size=8, n_positions=4, n_embd=32, n_layer=1, n_head=4))
    both = ("norm1", "norm2", "mixer.Wqkv", "mixer.out_proj", "mlp.fc1", "mlp.fc2")
    kinds = ("weight", "bias")
    assert set(ours.state_dict()) == {
        "transformer.embeddings.word_embeddings.weight", "transformer.embeddings.position_embeddings.weight",
        "transformer.ln_f.weight", "transformer.ln_f.bias", "lm_head.weight",
        *(f"transformer.layers.0.{name}.{kind}" for name in both for kind in kinds),
    }  # fmt: skip
    model = bert.BertForPreTraining(bert_config(num_hidden_layers=1))
    heads = ("predictions.transform.dense", "predictions.transform.layer_norm", "predictions.decoder",
             "seq_relationship")  # fmt: skip
    assert set(model.state_dict()) == {
        *(f"bert.embeddings.{name}_embeddings.weight" for name in ("word", "position", "token_type")),
        *(f"bert.{name}.{kind}" for name in ("emb_ln", "pooler.dense") for kind in kinds),
        *(f"bert.encoder.layers.0.{name}.{kind}" for name in both for kind in kinds),
        *(f"cls.{name}.{kind}" for name in heads for kind in kinds),
    }
    names = set(VisionTransformer(img_size=8, patch_size=4, embed_dim=8, depth=1, num_heads=2).state_dict())
    assert {"cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.mixer.Wq.weight", "norm.weight",
            "blocks.0.mixer.Wkv.bias", "head.bias"} <= names  # fmt: skip


def test_weights_from_when_norms_followed_layers():
    config = transformers.GPT2Config(vocab_size=8, n_positions=4, n_embd=32, n_layer=2, n_head=4)
    ours = gpt.GPTLMHeadModel(config)
    weights, old = ours.state_dict(), {}
    names = {"layers.0.norm1": "ln_0", "layers.0.norm2": "layers.0.norm1", "layers.1.norm1": "layers.0.norm2",
             "layers.1.norm2": "layers.1.norm1", "ln_f": "layers.1.norm2"}  # fmt: skip
    for i, (name, x) in enumerate(weights.items()):
        part, kind = name.removeprefix("transformer.").rsplit(".", 1)
        old[f"transformer.{names[part]}.{kind}" if part in names else name] = x + i
    ours.load_state_dict(old)
    for i, (name, x) in enumerate(ours.state_dict().items()):
        if ".norm" in name or "ln_f" in name:
            kind = name.rsplit(".", 1)[1]
            assert x.eq(i + (1.0 if kind == "weight" else 0.0)).all(), name


def test_megatron_keeps_heads_together():
    config = transformers.GPT2Config(vocab_size=8, n_positions=4, n_embd=8, n_layer=1, n_head=2)
    qkv = torch.arange(24.0)[:, None].expand(24, 8)
    weights = {"language_model.embedding.word_embeddings.weight": torch.zeros(8, 8),
               "language_model.encoder.final_layernorm.weight": torch.ones(8),
               "language_model.encoder.layers.0.self_attention.query_key_value.weight": qkv}  # fmt: skip
    ours = gpt.remap_state_dict_megatron(weights, config)
    rows = ours["transformer.layers.0.mixer.Wqkv.weight"][:, 0].view(3, 2, 4)
    assert rows[:, :, 0].tolist() == [[0, 12], [4, 16], [8, 20]]
    assert {"transformer.ln_f.weight", "lm_head.weight"} < set(ours)
