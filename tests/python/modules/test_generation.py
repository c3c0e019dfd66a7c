"""Sampling and decoding, on a model so small that its distribution can be counted."""

from __future__ import annotations

import pytest
import torch
from flash_attn.models.gpt import GPTLMHeadModel
from flash_attn.utils import generation as G
from support import device

pytestmark = pytest.mark.device


class Config:
    """What GPTLMHeadModel reads of a GPT2Config."""

    vocab_size, max_position_embeddings, hidden_size, num_hidden_layers, num_attention_heads = 11, 0, 32, 2, 4
    n_inner, activation_function, layer_norm_epsilon, initializer_range = None, "gelu", 1e-5, 0.02
    scale_attn_weights, scale_attn_by_inverse_layer_idx = True, False
    attn_pdrop = resid_pdrop = embd_pdrop = 0.0
    rotary_emb_fraction, use_flash_attn = 1.0, True


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    made = [GPTLMHeadModel(Config).eval() for _ in range(2)]
    for model in made:
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.3)
    return made


def greedy(model, ids, n):
    for _ in range(n):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    return ids


def test_greedy_is_the_full_forward_again_and_again(models):
    ids = torch.randint(0, 11, (3, 4))
    out = models[0].generate(ids, max_length=12, return_dict_in_generate=True, output_scores=True)
    assert out.sequences.equal(greedy(models[0], ids, 8)) and len(out.scores) == 8
    full = models[0](out.sequences).logits[:, 3:-1]
    assert torch.allclose(torch.stack(out.scores, 1), full, atol=1e-5)
    assert models[0].generate(ids, max_length=12, return_dict_in_generate=True).scores is None


def test_teacher_and_end(models):
    ids = torch.randint(0, 11, (1, 4))
    taught = torch.randint(0, 11, (1, 9))
    out = G.decode(ids, models[0], 12, teacher_outputs=taught)
    assert out.sequences[:, 4:9].equal(taught[:, 4:])
    tokens = greedy(models[0], ids, 8)
    eos = int(tokens[0, 6])
    end = int((tokens[0, 4:] == eos).nonzero()[0]) + 5
    assert G.decode(ids, models[0], 12, eos_token_id=eos).sequences.equal(tokens[:, :end])
    assert G.decode_speculative(ids, models[0], models[1], 12, eos_token_id=eos).sequences.equal(tokens[:, :end])


@pytest.mark.parametrize("lookahead", [1, 3, 20])
@pytest.mark.parametrize("draft", [0, 1], ids=["itself", "another"])
def test_speculative_decoding_gives_the_models_tokens(models, draft, lookahead):
    ids = torch.randint(0, 11, (1, 4))
    out = G.decode_speculative(ids, models[0], models[draft], 16, speculative_lookahead=lookahead)
    assert out.sequences.equal(greedy(models[0], ids, 12)) and len(out.scores) == 12


def frequencies(draws: torch.Tensor, n: int) -> torch.Tensor:
    return torch.bincount(draws, minlength=n).double() / len(draws)


def test_speculative_samples_have_the_models_distribution():
    logits, logits_draft = torch.randn(1, 3, 5).expand(40000, 3, 5), torch.randn(1, 2, 5).expand(40000, 2, 5)
    draft = logits_draft.softmax(-1).flatten(0, 1).multinomial(1).view(40000, 2)
    tokens, n = G.sample_speculative(logits, logits_draft, draft, top_k=0)
    for i in range(3):
        drawn = tokens[n > i, i]
        expected = logits[0, i].double().softmax(-1)
        assert len(drawn) > 500
        assert (frequencies(drawn, 5) - expected).abs().max() < 4 * 0.5 / len(drawn) ** 0.5
    assert set(n.tolist()) == {1, 2, 3}


def test_sample():
    logits = torch.tensor([[0.5, 0.1, 0.3, 0.06, 0.04]]).log()
    many = logits.expand(20000, 5)
    before = logits.clone()
    assert G.sample(logits).tolist() == [0]
    cases = [
        (dict(top_k=0), [0.5, 0.1, 0.3, 0.06, 0.04]),
        (dict(top_k=2), [0.625, 0, 0.375, 0, 0]),
        (dict(top_k=0, top_p=0.7), [0.625, 0, 0.375, 0, 0]),
        (dict(top_k=0, top_p=0.4), [1, 0, 0, 0, 0]),
        (dict(top_k=0, temperature=0.5), [0.25, 0.01, 0.09, 0.0036, 0.0016]),
    ]
    for options, expected in cases:
        expected = torch.tensor(expected, dtype=torch.float64)
        got = frequencies(G.sample(many, **options), 5)
        assert (got - expected / expected.sum()).abs().max() < 0.015, options
        assert not got[expected == 0].any()
    assert logits.equal(before)
    with pytest.raises(ValueError, match="top_p: expected at most 1"):
        G.sample(logits, top_k=0, top_p=1.5)


@device.cpu_only("stands in for graphs")
def test_steps_of_a_graph_find_their_place(models, monkeypatch):
    """Without a GPU: a step reads its place from lengths_per_sample alone, as a replayed graph does."""
    captured = []

    def capture(model, params, batch, max_seqlen, n, mempool, n_warmups):
        captured.append((batch, n))
        fixed = G.InferenceParams(params.max_seqlen, batch, max_seqlen - n,
                                  key_value_memory_dict=params.key_value_memory_dict,
                                  lengths_per_sample=params.lengths_per_sample)  # fmt: skip

        def run(ids, position_ids, seqlen):
            fixed.lengths_per_sample.fill_(seqlen)
            return model(ids, position_ids=position_ids, inference_params=fixed, num_last_tokens=n).logits

        return run

    monkeypatch.setattr(G, "_require_cuda", lambda device: None)
    monkeypatch.setattr(G, "capture_graph", capture)
    monkeypatch.setattr(torch.cuda.graphs, "graph_pool_handle", lambda: None)
    model = models[0]
    for batch, prompt, length in ((3, 4, 12), (3, 2, 9), (2, 5, 12), (3, 4, 14)):
        ids = torch.randint(0, 11, (batch, prompt))
        assert G.decode(ids, model, length, cg=True).sequences.equal(greedy(model, ids, length - prompt))
    # The second call finds its graph; the third has fewer rows; the fourth needs longer caches, and new graphs.
    assert captured == [(3, 1), (2, 1), (3, 1)]
    del model._decoding_cache


def test_refuses_in_words(models):
    ids = torch.randint(0, 11, (2, 4))
    with pytest.raises(ValueError, match="max_length: expected more than the prompt's 4 tokens, got 4"):
        G.decode(ids, models[0], 4)
    if device.DEVICE == "cpu":
        with pytest.raises(NotImplementedError, match="CUDA graphs need a model on a CUDA device"):
            G.decode(ids, models[0], 8, cg=True)
    with pytest.raises(NotImplementedError, match="expected batch 1, got 2"):
        G.decode_speculative(ids, models[0], models[0], 8)


def test_caches_are_made_and_kept(models):
    caches = models[0].allocate_inference_cache(2, 8)
    assert {i: tuple(c.shape) for i, c in caches.items()} == {i: (2, 8, 2, 4, 8) for i in range(2)}
    same = G.allocate_inference_cache(2, 8, 4, 8, 2, device.DEVICE, torch.float32)
    assert {i: c.shape for i, c in same.items()} == {i: c.shape for i, c in caches.items()}
    params = G.InferenceParams(8, 2, seqlen_offset=3, lengths_per_sample=torch.tensor([3, 2]))
    params.key_value_memory_dict = caches
    params.reset(6, 1)
    assert (params.max_seqlen, params.max_batch_size, params.seqlen_offset) == (6, 1, 0)
    assert params.lengths_per_sample.tolist() == [0, 0] and params.key_value_memory_dict is caches
