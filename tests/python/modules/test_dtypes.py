"""Layers in two dtypes against their definition in float64, decoding, and the graphs of a CUDA device."""

from __future__ import annotations

import pytest
import torch
from flash_attn.models.gpt import GPTLMHeadModel
from flash_attn.modules.mha import MHA, get_alibi_slopes
from flash_attn.utils.generation import InferenceParams, decode

from modules.formula import close, mha
from modules.test_generation import Config

pytestmark = pytest.mark.device

CASES = {
    "rotary gqa": dict(rotary_emb_dim=16, num_heads_kv=2, causal=True, use_flash_attn=True),
    "alibi window": dict(use_alibi=True, window_size=(5, 0), causal=True, use_flash_attn=True),
    "cross": dict(cross_attn=True, use_flash_attn=True),
    "masked": dict(causal=True),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_attention_layer(case, dtype):
    layer = MHA(128, 4, dtype=dtype, **CASES[case])
    weights = {n: p.detach().double().requires_grad_() for n, p in layer.named_parameters()}
    x = torch.randn(2, 70, 128, dtype=dtype)
    leaf = x.double().requires_grad_()
    options = dict(window_size=layer.inner_attn.window_size)
    if CASES[case].get("use_alibi"):
        options["slopes"] = torch.tensor(get_alibi_slopes(4))
    n = 70
    given = {}
    if case == "masked":  # causal: what is hidden at the end was seen by itself alone
        n = 60
        given["key_padding_mask"] = (torch.arange(70) < n).expand(2, 70)
    exact = mha(layer, weights, leaf, **options)[:, :n]
    x.requires_grad_()
    out = layer(x, **given)[:, :n]
    bound = 8 * torch.finfo(dtype).eps if dtype != torch.float32 else 1e-5
    close(out, exact, bound=bound)
    dout = torch.randn_like(exact).to(dtype)
    ours = torch.autograd.grad(out, [x, *layer.parameters()], dout)
    theirs = torch.autograd.grad(exact, [leaf, *weights.values()], dout.double())
    for name, a, b in zip(["x", *weights], ours, theirs, strict=True):
        close(a, b, name, 2 * bound)


@pytest.mark.parametrize("case", ["rotary gqa", "alibi window"])
def test_decoding(case):
    layer = MHA(128, 4, layer_idx=0, **CASES[case]).eval()
    x = torch.randn(2, 40, 128)
    params = InferenceParams(max_seqlen=48, max_batch_size=2)
    outs = []
    with torch.no_grad():
        for part in x.split([33, 1, 1, 3, 1, 1], dim=1):
            outs.append(layer(part, inference_params=params))
            params.seqlen_offset += part.shape[1]
        close(torch.cat(outs, dim=1), layer(x).double(), bound=1e-5)


def test_graphs_decode_the_same_tokens(device):
    if torch.device(device).type != "cuda":
        pytest.skip("CUDA graphs")
    model = GPTLMHeadModel(Config).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    for batch, prompt, length in ((3, 4, 40), (2, 9, 30), (3, 4, 60)):
        ids = torch.randint(0, 11, (batch, prompt))
        assert decode(ids, model, length, cg=True).sequences.equal(decode(ids, model, length).sequences)
