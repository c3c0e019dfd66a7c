"""The decoders that models' modules rename: logits and greedy tokens against transformers', or against the formula."""

from __future__ import annotations

import copy
import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from modules.formula import close, rotated
from modules.test_models import VOCAB, randomized

transformers = pytest.importorskip("transformers")

from flash_attn.models import baichuan, bigcode, btlm, falcon, gpt, gpt_neox, gptj, opt  # noqa: E402
from flash_attn.models._config import fraction_of  # noqa: E402
from flash_attn.models._formats import remap_of  # noqa: E402

pytestmark = pytest.mark.device

NO_TOKENS = dict(vocab_size=VOCAB, bos_token_id=None, eos_token_id=None)


def of(module, kind: str, name: str, **sizes):
    """-> transformers' model, its configuration, ours, and what renames the weights."""
    config = getattr(transformers, f"{kind}Config")(**NO_TOKENS, **sizes)
    config._attn_implementation = "eager"
    theirs = randomized(getattr(transformers, f"{kind}ForCausalLM")(config))
    return (
        theirs,
        getattr(module, f"{name}_config_to_gpt2_config")(config),
        getattr(module, f"remap_state_dict_hf_{name}"),
    )


of_opt = partial(of, opt, "OPT", "opt", hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
                 max_position_embeddings=40, pad_token_id=None)  # fmt: skip
of_gptj = partial(of, gptj, "GPTJ", "gptj", n_positions=40, n_embd=32, n_layer=2, n_head=4, rotary_dim=4)
of_neox = partial(of, gpt_neox, "GPTNeoX", "gpt_neox", hidden_size=64, intermediate_size=48, num_hidden_layers=2,
                  num_attention_heads=4, max_position_embeddings=40)  # fmt: skip
of_falcon = partial(of, falcon, "Falcon", "falcon", hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
of_bigcode = partial(of, bigcode, "GPTBigCode", "bigcode", n_positions=40, n_embd=32, n_layer=2, n_head=4)

DECODERS = {
    "opt": of_opt,
    "opt-350m": partial(of_opt, do_layer_norm_before=False, word_embed_proj_dim=16),
    "opt, no biases": partial(of_opt, enable_bias=False),
    "gptj": of_gptj,
    "gptj, tied": partial(of_gptj, n_inner=48, tie_word_embeddings=True),
    "gpt-neox": of_neox,
    "gpt-neox, one after the other": partial(of_neox, use_parallel_residual=False, attention_bias=False,
                                             rope_parameters=dict(rope_type="default", rope_theta=500.0,
                                                                  partial_rotary_factor=0.5)),
    "falcon-7b": of_falcon,
    "falcon-40b": partial(of_falcon, new_decoder_architecture=True, num_kv_heads=2),
    "falcon-11b": partial(of_falcon, new_decoder_architecture=True, num_kv_heads=2, num_ln_in_parallel_attn=1,
                          ffn_hidden_size=48, tie_word_embeddings=False),
    "falcon, one after the other": partial(of_falcon, multi_query=False, parallel_attn=False, bias=True),
    "bigcode": of_bigcode,
    "bigcode, all heads of keys": partial(of_bigcode, multi_query=False, scale_attn_weights=False),
}  # fmt: skip


@pytest.mark.parametrize("kernels", [{}, dict(use_flash_attn=True, pad_vocab_size_multiple=8),
                                     dict(use_flash_attn=True, fused_mlp=True, fused_bias_fc=True,
                                          fused_dropout_add_ln=True, residual_in_fp32=True)],
                         ids=["plain", "flash", "fused"])  # fmt: skip
@pytest.mark.parametrize("name", DECODERS)
def test_decoder(name, kernels):
    theirs, config, remap = DECODERS[name]()
    unserved = {"residual_in_fp32"} if not getattr(config, "prenorm", True) else set()
    unserved |= {"fused_mlp"} if config.activation_function == "gelu" else set()
    for option in kernels.keys() - unserved:
        setattr(config, option, kernels[option])
    ours = gpt.GPTLMHeadModel(config).eval()
    ours.load_state_dict(remap(theirs.state_dict(), config))
    ids = torch.randint(0, VOCAB, (2, 9))
    exact = copy.deepcopy(theirs).double()(ids).logits
    close(ours(ids).logits[..., :VOCAB], exact, bound=1e-5)
    close(ours(ids, num_last_tokens=2).logits[..., :VOCAB], exact[:, -2:], bound=1e-5)
    tokens = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_length=20, do_sample=False, pad_token_id=0)
    assert ours.generate(ids, max_length=20, vocab_size=VOCAB).equal(tokens)


class Formula:
    """GPTLMHeadModel's formula in float64 from others' weights: norm, attention, norm, feed-forward layer."""

    def __init__(self, weights, nheads: int):
        self.weights, self.nheads = {name: x.double() for name, x in weights.items()}, nheads

    def attention(self, q, k, v, scale: float, alibi: bool):
        """q, k, v (batch, seqlen, nheads, d), causal."""
        scores = torch.einsum("bihd,bjhd->bhij", q, k) * scale
        i, j = torch.arange(q.shape[1])[:, None], torch.arange(q.shape[1])
        if alibi:
            slopes = torch.tensor([2.0 ** (-8.0 * (h + 1) / self.nheads) for h in range(self.nheads)]).double()
            scores = scores - slopes[:, None, None] * (i - j).abs()
        weights = scores.masked_fill(j > i, -math.inf).softmax(-1)
        return torch.einsum("bhij,bjhd->bihd", weights, v).flatten(-2)

    def heads(self, x):
        return x.unflatten(-1, (self.nheads, -1))


class Btlm(Formula):
    """Weights are (in, out). muP: the embedding and the logits are multiplied, scores divided by d."""

    def linear(self, x, name):
        return x @ self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def norm(self, x, name):
        return F.layer_norm(x, x.shape[-1:], self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def __call__(self, ids, c):
        x = self.weights["transformer.wte.weight"][ids]
        if c.position_embedding_type == "learned":
            x = x + self.weights["transformer.wpe.weight"][: ids.shape[1]]
        x = x * c.mup_embeddings_scale
        for i in range(c.num_hidden_layers):
            layer = f"transformer.h.{i}"
            q, k, v = (
                self.heads(y) for y in self.linear(self.norm(x, f"{layer}.ln_1"), f"{layer}.attn.c_attn").chunk(3, -1)
            )
            scale = q.shape[-1] ** (-1.0 if c.mup_scale_qk_dot_by_d else -0.5)
            y = self.attention(q, k, v, scale, c.position_embedding_type == "alibi")
            x = x + self.linear(y, f"{layer}.attn.c_proj")
            y = self.norm(x, f"{layer}.ln_2")
            y = self.linear(y, f"{layer}.mlp.c_fc") * F.silu(self.linear(y, f"{layer}.mlp.c_fc2"))
            x = x + self.linear(y, f"{layer}.mlp.c_proj")
        x = self.norm(x, "transformer.ln_f") @ self.weights["transformer.wte.weight"].T
        return x * c.mup_output_alpha * c.mup_width_scale


class Baichuan(Formula):
    def norm(self, x, name):
        return x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * self.weights[f"{name}.weight"]

    def __call__(self, ids, rotary: bool, norm_head: bool, nlayers: int):
        x = self.weights["model.embed_tokens.weight"][ids]
        for i in range(nlayers):
            w, layer = self.weights, f"model.layers.{i}"
            qkv = self.norm(x, f"{layer}.input_layernorm") @ w[f"{layer}.self_attn.W_pack.weight"].T
            q, k, v = (self.heads(y) for y in qkv.chunk(3, -1))
            if rotary:
                q, k = (rotated(y, 10000.0, y.shape[-1], interleaved=False) for y in (q, k))
            y = self.attention(q, k, v, q.shape[-1] ** -0.5, alibi=not rotary)
            x = x + y @ w[f"{layer}.self_attn.o_proj.weight"].T
            y = self.norm(x, f"{layer}.post_attention_layernorm")
            gate, up, down = (w[f"{layer}.mlp.{name}_proj.weight"].T for name in ("gate", "up", "down"))
            x = x + (F.silu(y @ gate) * (y @ up)) @ down
        head = self.weights["lm_head.weight"]
        return self.norm(x, "model.norm") @ (F.normalize(head) if norm_head else head).T


def check(config, weights, remap, formula):
    """formula(ids) -> logits."""
    assert remap_of(weights, "") is remap
    ours = gpt.GPTLMHeadModel(config).eval()
    ours.load_state_dict(remap(weights, config))
    ids = torch.randint(0, VOCAB, (2, 9))
    close(ours(ids).logits, formula(ids), bound=1e-5)
    tokens = ids
    while tokens.shape[1] < 16:
        tokens = torch.cat([tokens, formula(tokens)[:, -1:].argmax(-1)], dim=1)
    assert ours.generate(ids, max_length=16).equal(tokens)


@pytest.mark.parametrize("positions, by_d", [("alibi", True), ("learned", False)])
def test_btlm(positions, by_d):
    c = SimpleNamespace(
        **NO_TOKENS, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, n_inner=44, n_positions=40,
        activation_function="swiglu", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, layer_norm_epsilon=1e-5,
        initializer_range=0.02, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, alibi_scaling=None,
        position_embedding_type=positions, mup_width_scale=0.5, mup_embeddings_scale=3.0, mup_output_alpha=2.5,
        mup_scale_qk_dot_by_d=by_d,
    )  # fmt: skip
    shapes = {"wte": (VOCAB, 32), "ln_f": 32} | ({"wpe": (40, 32)} if positions == "learned" else {})
    for i in range(2):
        linear = {"attn.c_attn": 96, "attn.c_proj": 32, "mlp.c_fc": 44, "mlp.c_fc2": 44}
        shapes |= {f"h.{i}.{name}": (32, n) for name, n in linear.items()}
        shapes |= {f"h.{i}.mlp.c_proj": (44, 32), f"h.{i}.ln_1": 32, f"h.{i}.ln_2": 32}
    weights = {}
    for name, shape in shapes.items():
        sizes = shape if isinstance(shape, tuple) else (shape,)
        weights[f"transformer.{name}.weight"] = torch.randn(sizes) * 0.3
        if name not in ("wte", "wpe"):
            weights[f"transformer.{name}.bias"] = torch.randn(sizes[-1]) * 0.3
    more = {"transformer.relative_pe.slopes": torch.ones(4, 1), "lm_head.weight": weights["transformer.wte.weight"]}
    config = btlm.btlm_config_to_gpt2_config(c)
    check(config, weights | more, btlm.remap_state_dict_hf_btlm, partial(Btlm(weights, 4), c=c))
    c.alibi_scaling = {"type": "linear", "factor": 2.0}
    with pytest.raises(NotImplementedError, match="alibi_scaling: expected None"):
        btlm.btlm_config_to_gpt2_config(c)
    c.position_embedding_type = "relative"
    with pytest.raises(NotImplementedError, match="position_embedding_type: expected 'alibi' or 'learned'"):
        btlm.btlm_config_to_gpt2_config(c)


def baichuan_config(**options):
    sizes = dict(hidden_size=32, intermediate_size=44, num_hidden_layers=2, num_attention_heads=4)
    return SimpleNamespace(**{**NO_TOKENS, **sizes, "hidden_act": "silu", "rms_norm_eps": 1e-6,
                              "initializer_range": 0.02, "pad_token_id": None, **options})  # fmt: skip


@pytest.mark.parametrize("rotary", [True, False], ids=["rotary", "alibi"])
@pytest.mark.parametrize("norm_head", [False, True], ids=["1", "2"])
def test_baichuan(rotary, norm_head):
    config = baichuan.baichuan_config_to_gpt2_config(baichuan_config())
    assert config.rotary_emb_fraction == 1.0 and not config.use_alibi and not config.norm_head
    if not rotary:
        config.rotary_emb_fraction, config.use_alibi, config.use_flash_attn = 0.0, True, True
    config.norm_head = norm_head
    names = {"model.embed_tokens": (VOCAB, 32), "lm_head": (VOCAB, 32), "model.norm": (32,)}
    for i in range(2):
        shapes = {"input_layernorm": (32,), "post_attention_layernorm": (32,), "self_attn.W_pack": (96, 32),
                  "self_attn.o_proj": (32, 32), "mlp.gate_proj": (44, 32), "mlp.up_proj": (44, 32),
                  "mlp.down_proj": (32, 44)}  # fmt: skip
        names |= {f"model.layers.{i}.{name}": shape for name, shape in shapes.items()}
    weights = {f"{name}.weight": torch.randn(shape) * 0.3 for name, shape in names.items()}
    formula = partial(Baichuan(weights, 4), rotary=rotary, norm_head=norm_head, nlayers=2)
    check(config, weights, baichuan.remap_state_dict_hf_baichuan, formula)


def test_baichuan_by_size():
    config = baichuan.baichuan_config_to_gpt2_config(baichuan_config(hidden_size=5120, vocab_size=125696))
    assert (config.use_alibi, config.use_flash_attn, config.rotary_emb_fraction, config.norm_head) == (
        True,
        True,
        0.0,
        True,
    )


@pytest.mark.parametrize("multi_query", [True, False])
def test_bigcode_and_back(multi_query):
    theirs, config, remap = of_bigcode(multi_query=multi_query)
    weights = theirs.state_dict()
    back = bigcode.inv_remap_state_dict_hf_bigcode(remap(weights, config), config)
    assert set(back) == set(weights) and all(back[name].equal(x) for name, x in weights.items())


def test_name_of_the_last_norm_in_opt_175b():
    theirs, config, remap = of_opt()
    weights = theirs.state_dict()
    old = {name.replace("decoder.final_layer_norm", "decoder.layer_norm"): x for name, x in weights.items()}
    assert set(old) != set(weights) and set(remap(old, config)) == set(remap(weights, config))


def test_older_names_of_gpt_neox():
    theirs, config, remap = of_neox()
    weights = theirs.state_dict()
    old = {name.replace("lm_head.", "embed_out."): x for name, x in weights.items()}
    old |= {"gpt_neox.layers.0.attention.bias": torch.ones(1), "gpt_neox.layers.0.attention.masked_bias": torch.ones(1),
            "gpt_neox.layers.0.attention.rotary_emb.inv_freq": torch.ones(1)}  # fmt: skip
    new, same = remap(weights, config), remap(old, config)
    assert set(new) == set(same) and all(new[name].equal(x) for name, x in same.items())


@pytest.mark.parametrize("config, said", [
    (opt.opt_config_to_gpt2_config, ("OPT", dict(layerdrop=0.1), "layerdrop: expected 0.0, got 0.1")),
    (gptj.gptj_config_to_gpt2_config, ("GPTJ", dict(rotary_dim=512), "rotary_dim: expected 1 to the head's 256")),
    (gpt_neox.gpt_neox_config_to_gpt2_config, ("GPTNeoX", dict(rope_scaling={"rope_type": "linear", "factor": 2.0}),
                                               "positions scaled by 'linear'")),
    (falcon.falcon_config_to_gpt2_config, ("Falcon", dict(alibi=True), "scales ALiBi with the scores")),
    (bigcode.bigcode_config_to_gpt2_config, ("GPTBigCode", dict(add_cross_attention=True), "has no cross-attention")),
], ids=["opt", "gptj", "gpt-neox", "falcon", "bigcode"])  # fmt: skip
def test_refusals(config, said):
    kind, options, message = said
    with pytest.raises((NotImplementedError, ValueError), match=message):
        config(getattr(transformers, f"{kind}Config")(**options))


def test_rotary_dim_survives_its_fraction():
    """30 / 88 * 88 is below 30 in floating point."""
    assert int(30 / 88 * 88) == 29
    assert all(int(fraction_of(r, d) * d) == r for d in range(1, 257) for r in range(1, d + 1))


@pytest.mark.parametrize("name", ["opt", "gptj", "gpt-neox", "falcon-7b", "falcon-40b", "bigcode",
                                  "bigcode, all heads of keys"])  # fmt: skip
def test_from_pretrained(name, tmp_path):
    """Whose weights they are is seen from their names."""
    theirs, config, remap = DECODERS[name]()
    theirs.save_pretrained(tmp_path)
    ours, ids = gpt.GPTLMHeadModel.from_pretrained(tmp_path, config).eval(), torch.randint(0, VOCAB, (1, 5))
    close(ours(ids).logits, theirs.double()(ids).logits, bound=1e-5)
    torch.save({"w": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(NotImplementedError, match="has no weights of a known model"):
        gpt.GPTLMHeadModel.from_pretrained(tmp_path, config)
