"""Models of transformers on our attention: what takes longer than the tests of integrations/, over all models.

There, logits and gradients are compared with "eager" in fp32, and generation token by token, under every padding.
"""

from __future__ import annotations

import pytest
import torch
from flash_attn.integrations import transformers as plus
from integrations import test_transformers as quick

MODELS = {name: (spec, None) for name, spec in quick.DECODERS.items()} | quick.OTHERS
SIXTEEN = [torch.bfloat16, torch.float16]


def inputs_of(name: str, model, side: str):
    """-> run(model), the rows that count or None: logits of decoders, last hidden states of others."""
    inputs = MODELS[name][1]
    if inputs is None:
        ids, mask = quick.padded(side)
        return lambda m: m(ids, attention_mask=mask).logits, mask.bool()
    return inputs(model, side)


def cast(run, dtype):
    """Pictures and sound in the model's dtype."""
    for cell in run.__closure__ or ():
        if isinstance(cell.cell_contents, torch.Tensor) and cell.cell_contents.is_floating_point():
            cell.cell_contents = cell.cell_contents.to(dtype)


def norm(tensors) -> float:
    return sum(x.double().square().sum() for x in tensors).sqrt().item()


@pytest.mark.parametrize("dtype", SIXTEEN, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_16_bits_err_no_more_than_eager(name, dtype):
    """Logits and all gradients, each as one vector, against eager in fp32 on weights that 16 bits hold. Two sums of
    rounded numbers: up to 1.5 times."""
    model = quick.build(MODELS[name][0]).to(dtype)
    run, rows = inputs_of(name, model, "left")

    def results(attention):
        cast(run, next(model.parameters()).dtype)
        return [x.float() for x in quick.results(model, attention, run, rows)]

    eager, ours = results("eager"), results(plus.NAME)
    model.float()
    truth = results("eager")
    if not all(x.isfinite().all() for x in eager):
        pytest.skip(f"eager itself overflows in {dtype}")
    for part in (slice(0, 1), slice(1, None)):
        errors = [norm(x - y for x, y in zip(mine[part], truth[part], strict=True)) for mine in (ours, eager)]
        assert 0 < errors[0] <= 1.5 * errors[1]


@pytest.mark.parametrize("name", MODELS)
def test_training(name):
    """Five steps of AdamW, with every parameter trained: the losses are eager's."""
    losses = {}
    for attention in ("eager", plus.NAME):
        torch.manual_seed(0)
        model = quick.build(MODELS[name][0])
        quick.choose(model, attention)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        torch.manual_seed(1)
        run, rows = inputs_of(name, model, "right")
        out = run(model) if rows is None else run(model)[rows]
        target, losses[attention] = torch.randn_like(out), []
        for _ in range(5):
            out = run(model) if rows is None else run(model)[rows]
            loss = (out - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[attention].append(loss.item())
    eager, ours = (torch.tensor(x) for x in losses.values())
    assert eager[-1] < eager[0]
    torch.testing.assert_close(ours, eager, rtol=1e-3, atol=0)


# Their own position_ids are learned or absent, or they take no packed rows in eager either.
PACKED = [name for name in quick.DECODERS if name not in ("gpt2", "llama4", "deepseek-v32")]


@pytest.mark.parametrize("name", PACKED)
def test_packed_rows_are_the_sequences_alone(name):
    model = quick.build(quick.DECODERS[name])
    quick.choose(model, plus.NAME)
    ids, positions = torch.randint(1, 100, (2, 12)), quick.packed_positions()
    out = model(ids, position_ids=positions, use_cache=False).logits.view(1, 24, -1)
    for a, b in zip(quick.STARTS, quick.STARTS[1:], strict=False):
        alone = model(ids.view(1, -1)[:, a:b], use_cache=False).logits
        assert (out[:, a:b] - alone).abs().max() <= quick.TOLERANCE * alone.abs().max() * 4


@pytest.mark.parametrize("options", [dict(num_beams=3), dict(do_sample=True, top_k=20)], ids=["beams", "sampling"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt-oss"])
def test_other_ways_to_generate(name, cache, options):
    model = quick.build(quick.DECODERS[name])
    ids, mask = quick.padded("left")
    tokens = []
    for attention in ("eager", plus.NAME):
        quick.choose(model, attention)
        torch.manual_seed(3)
        kind = dict(cache_implementation=None if cache == "dynamic" else cache, do_sample=False)
        tokens.append(model.generate(ids, attention_mask=mask, max_new_tokens=8, **{**kind, **options}))
    assert tokens[0].shape == (3, 20) and torch.equal(*tokens)


def test_a_draft_model():
    """Several new tokens are tried at once on a cache that is cut back: queries that are neither one nor all."""
    model, draft = (quick.build(quick.DECODERS["llama"], seed=seed) for seed in (0, 1))
    ids, tokens = quick.padded("none", batch=1)[0], []
    for attention in ("eager", plus.NAME):
        quick.choose(model, attention)
        quick.choose(draft, attention)
        tokens.append(model.generate(ids, assistant_model=draft, max_new_tokens=12, do_sample=False))
    assert tokens[0].shape == (1, 24) and torch.equal(*tokens)
