"""Models of transformers, with random weights, on our attention against their own "eager"."""

from __future__ import annotations

import inspect
import itertools
import subprocess
import sys
import types
from typing import NamedTuple

import pytest
import torch
from flash_attn.integrations import _attend
from flash_attn.integrations import transformers as plus
from flash_attn.integrations._row_mask import RowMask, row_mask
from support import device

pytestmark = pytest.mark.device

# Two layers of fp32 sums in another order; 9 eps of the largest element is the most measured.
TOLERANCE = 32 * torch.finfo(torch.float32).eps
WINDOW = 5  # shorter than all sequences here

SIZES = dict(
    vocab_size=100, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, pad_token_id=0, bos_token_id=None, eos_token_id=None, attention_dropout=0.0,
)  # fmt: skip


class Model(NamedTuple):
    name: str  # of the class: name + suffix
    config: str
    options: dict = {}
    suffix: str = "ForCausalLM"
    dense: bool = False  # whether its masks are more than intervals


ALTERNATING = dict(sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"])
DECODERS = {
    "llama": Model("Llama", "LlamaConfig"),
    "qwen2": Model("Qwen2", "Qwen2Config"),
    "qwen2-window": Model("Qwen2", "Qwen2Config", dict(use_sliding_window=True, **ALTERNATING)),
    "qwen3": Model("Qwen3", "Qwen3Config", dict(head_dim=16)),
    "mistral": Model("Mistral", "MistralConfig", dict(sliding_window=WINDOW)),
    "gemma2": Model("Gemma2", "Gemma2Config", dict(head_dim=16, query_pre_attn_scalar=32, **ALTERNATING)),
    "gemma3": Model("Gemma3", "Gemma3TextConfig", dict(head_dim=16, query_pre_attn_scalar=32, **ALTERNATING)),
    "phi": Model("Phi", "PhiConfig"),
    "phi3": Model("Phi3", "Phi3Config", dict(sliding_window=WINDOW)),
    "gpt-oss": Model("GptOss", "GptOssConfig", dict(head_dim=16, num_local_experts=4, **ALTERNATING)),
    "gpt2": Model("GPT2LMHead", "GPT2Config", dict(attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0), "Model"),
    "deepseek-v3": Model(  # queries and keys of 24, values of 16
        "DeepseekV3", "DeepseekV3Config",
        dict(num_key_value_heads=4, kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=16,
             v_head_dim=16, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
             first_k_dense_replace=2),
    ),
    "deepseek-v32": Model(  # an indexer chooses the keys that a query sees
        "DeepseekV32", "DeepseekV32Config",
        dict(num_key_value_heads=4, kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=16,
             v_head_dim=16, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
             first_k_dense_replace=2, index_topk=4, index_n_heads=2, index_head_dim=16),
        dense=True,
    ),
    "llama4": Model(
        "Llama4", "Llama4TextConfig",
        dict(head_dim=16, intermediate_size_mlp=128, num_local_experts=2, attention_chunk_size=WINDOW,
             layer_types=["chunked_attention", "full_attention"]),
        dense=True,
    ),
}  # fmt: skip


def build(spec: Model, seed: int = 0, **more):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    transformers.logging.set_verbosity_error()
    plus.enable()
    name = spec.name + spec.suffix
    if not hasattr(transformers, name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    config = getattr(transformers, spec.config)(**{**SIZES, **spec.options, **more})
    torch.manual_seed(seed)
    model = getattr(transformers, name)(config)
    with torch.no_grad():  # as initialised, attention is nearly uniform and most mistakes vanish in it
        for name, x in model.named_parameters():
            if x.dim() > 1 and any(part in name for part in ("q_proj", "k_proj", "Wqkv", "query", "key", "c_attn")):
                x.mul_(8)
            if "sinks" in name:
                x.normal_()
    return model.eval()


def choose(model, attention: str) -> None:
    if hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation(attention)
    else:
        model.config._attn_implementation = attention  # transformers 4.53
    if model.config._attn_implementation != attention:
        version = sys.modules["transformers"].__version__
        assert version.startswith("4."), "no model of today is left out"
        pytest.skip(f"transformers {version}: {type(model).__name__} does not take attention functions")


def padded(side: str, batch: int = 3, seqlen: int = 12):
    """-> token ids and mask, (batch, seqlen)."""
    ids = torch.randint(1, 100, (batch, seqlen))
    mask = torch.ones((batch, seqlen), dtype=torch.int64)
    if side == "left":
        mask[0, :7] = mask[1, :2] = 0
    if side == "right":
        mask[0, 5:] = mask[1, 10:] = 0
    if side == "both":
        mask[0, :3] = mask[0, 9:] = mask[1, 10:] = 0
    if side == "holes":
        mask[0, 3:6] = mask[1, :2] = mask[1, 8] = 0
    return ids, mask


def results(model, attention: str, run, of=None):
    """-> run(model), and the gradients of its mean square with respect to all parameters."""
    choose(model, attention)
    model.zero_grad()
    out = run(model)
    out = out if of is None else out[of]
    out.square().mean().backward()
    return [out.detach()] + [x.grad for x in model.parameters() if x.grad is not None]


def assert_same(model, run, of=None):
    expected, got = (results(model, name, run, of) for name in ("eager", plus.NAME))
    assert len(expected) == len(got) > 5
    scale = max(x.abs().max().item() for x in expected[1:])
    sizes = [expected[0].abs().max().item()] + [scale] * (len(got) - 1)
    for x, y, size in zip(expected, got, sizes, strict=True):
        assert (x - y).abs().max().item() <= TOLERANCE * size


@pytest.fixture
def no_dense_mask(monkeypatch):
    """Whoever makes a mask of seqlen_q x seqlen_k fails."""

    def fail(*_, **__):
        raise AssertionError("a dense mask was made")

    monkeypatch.setattr(plus, "_dense_mask", fail)
    monkeypatch.setattr(RowMask, "dense", fail)


@pytest.mark.parametrize("side", ["none", "left", "right", "both", "holes"])
@pytest.mark.parametrize("name", DECODERS)
def test_logits_and_gradients(name, side, request):
    spec = DECODERS[name]
    model = build(spec)
    if not spec.dense:
        request.getfixturevalue("no_dense_mask")
    ids, mask = padded(side)
    assert_same(model, lambda m: m(ids, attention_mask=mask).logits, of=mask.bool())


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", DECODERS)
def test_generate(name, cache, request):
    spec = DECODERS[name]
    model = build(spec)
    if not spec.dense:
        request.getfixturevalue("no_dense_mask")
    ids, mask = padded("left")
    tokens = {}
    for attention in ("eager", plus.NAME):
        choose(model, attention)
        options = dict(cache_implementation=None if cache == "dynamic" else cache)
        tokens[attention] = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, **options)
    assert tokens["eager"].shape == (3, 20) and torch.equal(*tokens.values())


def encoder(model, side):
    ids, mask = padded(side)
    return lambda m: m(ids, attention_mask=mask).last_hidden_state, mask.bool()


def vision(model, side):
    pixels = torch.randn(2, 3, 16, 16)
    return lambda m: m(pixels).last_hidden_state, None


def speech(model, side):
    features, (ids, mask) = torch.randn(3, 8, 24), padded(side)
    return lambda m: m(features, decoder_input_ids=ids, decoder_attention_mask=mask).last_hidden_state, mask.bool()


def text_to_text(model, side):
    (source, source_mask), (ids, mask) = padded(side, seqlen=12), padded(side, seqlen=10)

    def run(m):
        m = m(source, attention_mask=source_mask, decoder_input_ids=ids, decoder_attention_mask=mask)
        return m.last_hidden_state

    return run, mask.bool()


SEQ2SEQ = dict(
    d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
    encoder_ffn_dim=128, decoder_ffn_dim=128, dropout=0.0, decoder_start_token_id=1,
)  # fmt: skip
SPEECH = dict(num_mel_bins=8, max_source_positions=12, max_target_positions=32)
OTHERS = {
    "modernbert": (
        Model("ModernBert", "ModernBertConfig", dict(local_attention=6, global_attn_every_n_layers=2), "Model"),
        encoder,
    ),
    "bert": (Model("Bert", "BertConfig", dict(hidden_dropout_prob=0.0), "Model"), encoder),
    "vit": (
        Model("ViT", "ViTConfig", dict(image_size=16, patch_size=4, hidden_dropout_prob=0.0), "Model"),
        vision,
    ),
    "whisper": (Model("Whisper", "WhisperConfig", dict(SEQ2SEQ, **SPEECH), "Model"), speech),
    "bart": (Model("Bart", "BartConfig", SEQ2SEQ, "Model"), text_to_text),
    "t5": (  # a bias of positions
        Model(
            "T5", "T5Config", dict(d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, dropout_rate=0.0), "Model"
        ),
        text_to_text,
    ),
    # Models that know "eager" only: one adds masks to scores of its own, the other joins them to added masks.
    "bigbird-pegasus": (Model("BigBirdPegasus", "BigBirdPegasusConfig", SEQ2SEQ, "Model", dense=True), text_to_text),
    "deepseek-v4": (
        Model(
            "DeepseekV4", "DeepseekV4Config",
            dict(num_key_value_heads=1, head_dim=16, moe_intermediate_size=32, q_lora_rank=16, qk_rope_head_dim=8,
                 o_lora_rank=16, o_groups=2, n_routed_experts=2, num_experts_per_tok=1, index_topk=4, index_n_heads=2,
                 index_head_dim=16, hc_mult=2, sliding_window=WINDOW, partial_rotary_factor=0.5,
                 layer_types=["heavily_compressed_attention", "compressed_sparse_attention"]),
            "Model", dense=True,
        ),
        encoder,
    ),
}  # fmt: skip


@pytest.mark.parametrize("side", ["none", "left", "right", "both", "holes"])
@pytest.mark.parametrize("name", OTHERS)
def test_encoders_and_cross_attention(name, side, request):
    spec, inputs = OTHERS[name]
    model = build(spec)
    if not spec.dense:
        request.getfixturevalue("no_dense_mask")
    assert_same(model, *inputs(model, side))


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_from_speech(cache, request):
    if device.DEVICE == "cpu" or cache == "dynamic":  # transformers compiles the others: masks are dense there
        request.getfixturevalue("no_dense_mask")
    model = build(OTHERS["whisper"][0]._replace(suffix="ForConditionalGeneration"))
    features, tokens = torch.randn(2, 8, 24), []
    for attention in ("eager", plus.NAME):
        choose(model, attention)
        options = dict(cache_implementation=None if cache == "dynamic" else cache)
        tokens.append(model.generate(features, max_new_tokens=8, do_sample=False, **options))
    assert tokens[0].shape[1] >= 8 and torch.equal(*tokens)


STARTS = [0, 4, 5, 12, 18, 24]  # of the sequences in two rows of 12


def packed_positions():
    """-> position_ids (2, 12) that start anew at every sequence but the one that begins the second row."""
    return torch.cat([torch.arange(b - a) for a, b in itertools.pairwise(STARTS)]).view(2, 12)


@pytest.mark.parametrize("told", ["position_ids", "cu_seq_lens"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt-oss"])
def test_packed_sequences(name, told, no_dense_mask):
    model = build(DECODERS[name])
    ids, positions = torch.randint(1, 100, (2, 12)), packed_positions()
    extra = {}
    if told == "cu_seq_lens":
        starts = torch.tensor(STARTS)
        extra = dict(cu_seq_lens_q=starts, cu_seq_lens_k=starts, max_length_q=7, max_length_k=torch.tensor(7))

    def run(m):
        more = extra if m.config._attn_implementation == plus.NAME else {}
        return m(ids, position_ids=positions, use_cache=False, **more).logits

    if name != "gpt-oss":  # its eager masks are made without position_ids: sequences see one another
        assert_same(model, run)
    choose(model, plus.NAME)
    alone = model(ids.view(1, -1)[:, 5:12], use_cache=False).logits
    torch.testing.assert_close(run(model).view(1, 24, -1)[:, 5:12], alone, rtol=0, atol=1e-5)


def test_packed_sequences_told_by_lengths_alone(no_dense_mask):
    """Without position_ids the mask knows nothing of them: eager and sdpa let these sequences see one another. (Rotary
    positions are relative, so it does not matter that they go on from one sequence to the next.)"""
    model = build(DECODERS["mistral"])
    choose(model, plus.NAME)
    ids, starts = torch.randint(1, 100, (1, 24)), torch.tensor(STARTS, dtype=torch.int32)
    lengths = dict(cu_seq_lens_q=starts, cu_seq_lens_k=starts, max_length_q=7, max_length_k=7)
    out = model(ids, use_cache=False, **lengths).logits
    for a, b in itertools.pairwise(STARTS):
        torch.testing.assert_close(out[:, a:b], model(ids[:, a:b], use_cache=False).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt-oss"])
def test_bf16_errs_no_more_than_eager(name):
    """Both against eager in fp32, on weights that bf16 holds. Two sums of rounded numbers: up to 1.5 times."""
    model = build(DECODERS[name]).bfloat16()
    ids, mask = padded("left")

    def logits(attention):
        choose(model, attention)
        with torch.no_grad():
            return model(ids, attention_mask=mask).logits[mask.bool()].float()

    eager, ours = logits("eager"), logits(plus.NAME)
    truth = (model.float(), logits("eager"))[1]
    assert 0 < (ours - truth).square().mean() <= 1.5**2 * (eager - truth).square().mean()


@pytest.mark.parametrize("kind", ["bool", "added"])
def test_custom_mask_of_four_dimensions(kind):
    model = build(DECODERS["gemma2"])
    ids, _ = padded("none")
    seen = (torch.rand(3, 1, 12, 12) < 0.5) | torch.eye(12, dtype=torch.bool)
    added = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)

    def run(m):
        mask = seen if kind == "bool" and m.config._attn_implementation == plus.NAME else added
        return m(ids, attention_mask=mask).logits

    assert_same(model, run)


def test_function_masks_of_a_model_are_dense():
    """An or_mask_function is not read: image tokens that see each other, say."""
    masking_utils = pytest.importorskip("transformers.masking_utils", reason="transformers is not installed")
    causal = masking_utils.causal_mask_function
    first_three = lambda b, h, q, k: (q < 3) & (k < 3)  # noqa: E731
    arguments = dict(batch_size=2, kv_length=6, kv_offset=0)
    if "q_length" in inspect.signature(masking_utils.sdpa_mask).parameters:
        arguments |= dict(q_length=6, q_offset=0, use_vmap=True)
    else:
        arguments |= dict(cache_position=torch.arange(6))
    got = plus.mask(mask_function=masking_utils.or_masks(causal, first_three), allow_is_causal_skip=False, **arguments)
    assert type(got) is torch.Tensor and got[0, 0].sum() == 21 + 3
    assert isinstance(plus.mask(mask_function=causal, **arguments), RowMask)


@pytest.mark.parametrize("window", [None, WINDOW])
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("side", ["none", "left", "right", "both", "holes"])
def test_padding_mask_of_two_dimensions(side, is_causal, window):
    """Models that do not ask for a mask hand on what they were given."""
    q, k, v = (torch.randn(3, heads, 12, 16) for heads in (4, 2, 2))
    mask = padded(side)[1]
    module = types.SimpleNamespace(is_causal=is_causal)
    out, weights = plus.attention(module, q, k, v, mask, sliding_window=window)
    i, j = torch.arange(12)[:, None], torch.arange(12)
    seen = mask.bool()[:, None, None, :] & ((j <= i) if is_causal else (i == i))
    if window:
        seen = seen & (i - j < window) & (j - i < window)
    expected = torch.nn.functional.scaled_dot_product_attention(
        q, *(x.repeat_interleave(2, 1) for x in (k, v)), seen
    ).transpose(1, 2)
    assert weights is None
    torch.testing.assert_close(out[mask.bool()], expected[mask.bool()], rtol=0, atol=1e-5)


def test_masks_move_between_devices():
    mask = row_mask(
        (2, 3, 5), device.DEVICE, padding_mask=torch.tensor([[0, 1, 1, 1, 1], [1] * 5]).bool(), shift=2, right=0
    )
    for moved in (mask.to(device.DEVICE, copy=True), mask.clone(), mask.contiguous(), mask.to(torch.bool)):
        assert isinstance(moved, RowMask) and moved.padding == "left" and torch.equal(moved & True, mask & True)
    away = mask.to("meta", non_blocking=True)
    assert isinstance(away, RowMask) and away.device.type == away.first.device.type == away.shift.device.type == "meta"
    assert type(mask.float()) is torch.Tensor and mask.float().sum() == 2 * (3 + 4 + 5) - 3


def test_dropout_and_autocast():
    q, k, v = (torch.randn(2, 4, 9, 16) for _ in range(3))
    module = types.SimpleNamespace(is_causal=True)
    torch.manual_seed(1)
    out, _ = plus.attention(module, q, k, v, None, dropout=0.5, deterministic=True)
    torch.manual_seed(1)
    x = (x.transpose(1, 2) for x in (q, k, v))
    assert torch.equal(out, _attend.flash_attn_func(*x, 0.5, causal=True))
    with torch.autocast(torch.device(device.DEVICE).type, dtype=torch.bfloat16):
        assert plus.attention(module, q, k.bfloat16(), v, None)[0].dtype == torch.bfloat16


REFUSED = {
    "unknown": (dict(sinks=torch.zeros(1), block_size=3), NotImplementedError, "sinks, block_size: not known"),
    "indices": (
        dict(indices=torch.zeros(2, 8, 3)),
        ValueError,
        r"indices: .* \(batch, 9, n\), got \(2, 8, 3\) torch.f",
    ),
    "indices-packed": (
        dict(
            indices=torch.zeros(2, 9, 3),
            cu_seq_lens_q=torch.tensor([0, 18]),
            cu_seq_lens_k=torch.tensor([0, 18]),
        ),
        NotImplementedError,
        "indices: not served beside",
    ),
    "weights": (dict(output_attentions=True), NotImplementedError, "output_attentions: .*'eager'"),
    "sinks": (dict(s_aux=torch.zeros(3)), ValueError, r"s_aux: .* \(4\), got \(3,\)"),
    "half-packed": (dict(cu_seq_lens_q=torch.tensor([0, 9])), ValueError, "cu_seq_lens_k: .* got None"),
    "mask": (dict(attention_mask=torch.ones(2, 9, 9)), ValueError, r"attention_mask: expected .* got \(2, 9, 9\)"),
    "longer-mask": (dict(attention_mask=row_mask((2, 9, 12), device.DEVICE)), ValueError, r"got \(2, 1, 9, 12\)"),
    "packed-and-masked": (
        dict(attention_mask=torch.ones(2, 9), cu_seq_lens_q=torch.tensor([0, 18]), cu_seq_lens_k=torch.tensor([0, 18])),
        ValueError,
        "attention_mask: expected none beside",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case):
    keywords, error, message = REFUSED[case]
    q = torch.randn(2, 4, 9, 16)
    with pytest.raises(error, match=message):
        plus.attention(types.SimpleNamespace(is_causal=True), q, q, q, **{"attention_mask": None, **keywords})


def test_keywords_that_say_nothing_are_let_through():
    q, module = torch.randn(2, 4, 9, 16), types.SimpleNamespace(is_causal=True)
    said = {name: object() for name in plus.HARMLESS}
    out, _ = plus.attention(module, q, q, q, None, block_size=None, output_attentions=False, **said)
    assert torch.equal(out, plus.attention(module, q, q, q, None)[0])


@pytest.mark.parametrize("needs_grad", [False, True])
@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (3, 0), (3, 3), (2, -1)], ids=str)
@pytest.mark.parametrize("side", ["none", "left", "right", "both", "holes", "empty"])
@pytest.mark.parametrize("seqlen_q, shift", [(12, 0), (4, 8), (1, 11), (4, 0), (4, 3), (4, torch.tensor(3))], ids=str)
def test_every_way_of_a_row_mask(seqlen_q, shift, side, window, needs_grad):
    padding = padded(side)[1].bool()
    if side == "empty":
        padding[1] = False
    q = torch.randn(3, seqlen_q, 4, 16, requires_grad=needs_grad)
    k, v = (torch.randn(3, 12, 2, 16, requires_grad=needs_grad) for _ in range(2))
    mask = row_mask((3, seqlen_q, 12), q.device, padding_mask=padding, shift=shift, left=window[0], right=window[1])
    p, j = torch.arange(seqlen_q)[:, None] + shift, torch.arange(12)
    left, right = (x if x >= 0 else 100 for x in window)
    seen = padding[:, None, None, :] & (j >= p - left) & (j <= p + right)
    scores = dict(dropout_p=0.0, softmax_scale=None, softcap=0.0, learnable_sink=torch.ones(4), deterministic=False)
    out = _attend.attend(q, k, v, mask, scores)
    expected = _attend.flash_attn_func(q, k, v, attn_bias=_attend.as_bias(seen, q.dtype), **scores)
    tokens = torch.ones(3, seqlen_q, dtype=torch.bool)  # rows that count: all, or if causal those that are no padding
    if window[1] == 0:
        tokens = padding[:, p.flatten()]
    torch.testing.assert_close(out[tokens], expected[tokens], rtol=0, atol=1e-5)
    if side in ("none", "left", "right", "empty"):
        assert mask.padding in ("none", "left", "ends")
    # Whoever looks at a mask sees it dense. (Causal: also what lies behind the last query is known to be unseen.)
    assert torch.equal(torch.where(mask, 1, 0).bool(), seen) and torch.equal(mask[:, :, -1:, :9], seen[:, :, -1:, :9])
    assert isinstance(mask.contiguous().detach(), RowMask) and torch.equal(mask.detach() & seen, seen)
    if needs_grad:
        gradients, others = (torch.autograd.grad(x[tokens].square().sum(), (q, k, v)) for x in (out, expected))
        for x, y in zip(gradients, others, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant, no_dense_mask):
    model = build(DECODERS["mistral"]).train()
    ids, mask = padded("both")
    expected = results(model, "eager", lambda m: m(ids, attention_mask=mask).logits, mask.bool())
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(use_reentrant=reentrant))
    got = results(model, plus.NAME, lambda m: m(ids, attention_mask=mask).logits, mask.bool())
    for x, y in zip(expected, got, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-5)


def test_compiled_in_one_graph():
    """Masks are dense while a graph is traced; a mask that was made before is taken as it is."""
    model = build(DECODERS["llama"])
    ids, mask = padded("left")
    choose(model, plus.NAME)
    expected = model(ids, attention_mask=mask).logits[mask.bool()]
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    got = compiled(ids, attention_mask=mask, use_cache=False).logits[mask.bool()]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["mistral", "gpt-oss"])
def test_compiled_generation(name):
    """With a static cache every step runs the compiled model, whose masks are made outside of it."""
    model = build(DECODERS[name])
    if sys.modules["transformers"].__version__.startswith("4."):
        pytest.skip("transformers 4 passes masks in another way while it compiles")
    ids, mask = padded("left")
    choose(model, plus.NAME)
    options = dict(attention_mask=mask, max_new_tokens=6, do_sample=False, cache_implementation="static")
    expected = model.generate(ids, **options)
    torch.compiler.reset()
    model.forward = torch.compile(model.forward, backend="eager", fullgraph=True)
    assert torch.equal(model.generate(ids, **options), expected)


def test_compiled_without_padding_makes_no_mask(no_dense_mask):
    model = build(DECODERS["llama"]).train()
    ids, _ = padded("none")
    expected = results(model, "eager", lambda m: m(ids).logits)
    torch.compiler.reset()
    got = results(model, plus.NAME, lambda m: torch.compile(m, backend="eager", fullgraph=True)(ids).logits)
    for x, y in zip(expected, got, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-5)


def test_compiled_decoding_takes_masks_that_were_made_outside():
    module = types.SimpleNamespace(is_causal=True)

    def step(q, k, v, mask):
        return plus.attention(module, q, k, v, mask)[0]

    graphs = []
    torch.compiler.reset()
    compiled = torch.compile(step, backend=lambda graph, _: graphs.append(graph) or graph, fullgraph=True)
    k, v = torch.randn(2, 2, 12, 16), torch.randn(2, 2, 12, 16)
    padding = torch.ones(2, 12, dtype=torch.bool)
    padding[0, :2] = False
    with torch.no_grad():
        for shift in (5, 6, 7):
            q = torch.randn(2, 4, 1, 16)
            mask = row_mask((2, 1, 12), q.device, padding_mask=padding, shift=torch.tensor(shift), right=0)
            torch.testing.assert_close(compiled(q, k, v, mask), step(q, k, v, mask), rtol=0, atol=1e-6)
    assert len(graphs) == 1


def test_enable_says_which_transformers_it_needs(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", types.ModuleType("transformers"))
    monkeypatch.setattr(plus, "_found", lambda: "4.40.0")
    with pytest.raises(ImportError, match="needs transformers 4.53 or newer, found 4.40.0"):
        plus.enable()


def test_enable_takes_a_name_that_transformers_leaves_alone():
    with pytest.raises(ValueError, match="name: expected one without 'flash'"):
        plus.enable("flash_attention_plus")


def test_nothing_is_imported_before_it_is_asked_for():
    ways = ", ".join(f"flash_attn.integrations.{name}" for name in ("transformers", "diffusers", "sdpa"))
    code = f"import sys, {ways}; assert not {{'transformers', 'diffusers'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
