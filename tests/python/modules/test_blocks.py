"""Blocks, feed-forward layers and embeddings, by their definitions; what they are called in a state_dict."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from flash_attn.flash_attention import FlashMHA
from flash_attn.modules.block import Block, ParallelBlock, StochasticDepth
from flash_attn.modules.embedding import BertEmbeddings, GPT2Embeddings, VocabParallelEmbedding
from flash_attn.modules.mha import MHA
from flash_attn.modules.mlp import FusedMLP, GatedMlp, Mlp
from flash_attn.ops.triton.layer_norm import RMSNorm
from torch import nn

from modules.formula import close

MIXER, MLP = partial(MHA, num_heads=4), partial(Mlp, hidden_features=48)

pytestmark = pytest.mark.device


def randomized(module: nn.Module) -> nn.Module:
    for p in module.parameters():
        nn.init.normal_(p, std=0.3)
    return module


def in_float64(block: nn.Module):
    """The block's norms in float64; its mixer and mlp as they are: they have tests of their own."""

    def norm(h, layer):
        w, b = layer.weight.double(), None if layer.bias is None else layer.bias.double()
        if isinstance(layer, RMSNorm):
            return h / (h.square().mean(-1, keepdim=True) + layer.eps).sqrt() * w
        return F.layer_norm(h, h.shape[-1:], w, b, layer.eps)

    def call(layer, h):
        y = layer(h.float())
        return (y[0] if isinstance(y, tuple) else y).double()

    return norm, call


@pytest.mark.parametrize("norm_cls", [nn.LayerNorm, RMSNorm])
@pytest.mark.parametrize("fused", [False, True])
def test_prenorm_block(fused, norm_cls):
    block = randomized(Block(32, MIXER, MLP, norm_cls, fused_dropout_add_ln=fused, residual_in_fp32=True))
    norm, call = in_float64(block)
    x, residual = torch.randn(2, 5, 32), torch.randn(2, 5, 32)
    for given in (None, residual):
        y, h = block(x, given)
        exact_h = x.double() + (0 if given is None else given.double())
        exact_h = exact_h + call(block.mixer, norm(exact_h, block.norm1))
        close(h, exact_h)
        close(y, call(block.mlp, norm(exact_h, block.norm2)), bound=2e-5)


@pytest.mark.parametrize("return_residual", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_postnorm_block(fused, return_residual):
    mixer, mlp = partial(MIXER, return_residual=return_residual), partial(MLP, return_residual=return_residual)
    options = dict(prenorm=False, fused_dropout_add_ln=fused, return_residual=return_residual)
    block = randomized(Block(32, mixer, mlp, **options))
    norm, call = in_float64(block)
    x = torch.randn(2, 5, 32)
    h = norm(x.double() + call(block.mixer, x), block.norm1)
    close(block(x), norm(h + call(block.mlp, h), block.norm2), bound=1e-5)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_parallel_block(fused, tied):
    block = randomized(ParallelBlock(32, MIXER, MLP, tied_norm=tied, fused_dropout_add_ln=fused))
    norm, call = in_float64(block)
    x1, x2, residual = (torch.randn(2, 5, 32) for _ in range(3))
    for given in ((x1, None, None), (x1, x2, residual)):
        h = sum(t.double() for t in given if t is not None)
        y1, y2, stream = block(*given)
        close(stream, h)
        close(y1, call(block.mixer, norm(h, block.norm1)), bound=1e-5)
        close(y2, call(block.mlp, norm(h, block.norm1 if tied else block.norm2)), bound=1e-5)


def test_a_block_without_mlp_and_of_some_positions():
    block = Block(32, partial(MIXER, cross_attn=True), nn.Identity)
    x = torch.randn(2, 5, 32)
    y, h = block(x, mixer_subset=slice(0, 1))
    whole, stream = block(x)
    close(y, whole[:, :1].double(), bound=2e-6)
    assert h.equal(stream[:, :1]) and not hasattr(block, "norm2")


def test_gradients_reach_all_of_a_block():
    results = []
    for fused in (False, True):
        torch.manual_seed(1)
        block = Block(32, MIXER, MLP, fused_dropout_add_ln=fused)
        x = torch.randn(2, 5, 32, requires_grad=True)
        y, h = block(x, torch.ones(2, 5, 32))
        results.append(torch.autograd.grad((y * h).sum(), [x, *block.parameters()]))
    for a, b in zip(*results, strict=True):
        close(a, b.double(), bound=1e-5)


@pytest.mark.parametrize("fused", [False, True])
def test_drop_path_takes_whole_samples(fused):
    class Zero(nn.Module):
        def __init__(self, dim):
            super().__init__()

        def forward(self, x):
            return torch.zeros_like(x)

    block = Block(4, Zero, nn.Identity, drop_path1=0.5, fused_dropout_add_ln=fused)
    _, h = block(torch.ones(64, 3, 4), torch.zeros(64, 3, 4))
    values = h[:, 0, 0]
    assert h.eq(values[:, None, None]).all() and set(values.tolist()) == {0.0, 2.0}
    _, h = block.eval()(torch.ones(2, 3, 4), torch.zeros(2, 3, 4))
    assert h.eq(1).all()
    whole = StochasticDepth(0.5, "batch")(torch.ones(8, 3))
    assert whole.eq(whole[0, 0]).all()
    assert StochasticDepth(1.0)(torch.ones(8, 3)).eq(0).all()


def test_mlps():
    x = torch.randn(3, 16)
    mlp = Mlp(16, activation=F.relu)
    w1, b1, w2, b2 = (p.double() for p in mlp.parameters())
    close(mlp(x), F.relu(x.double() @ w1.T + b1) @ w2.T + b2)
    assert mlp.fc1.out_features == 64 and Mlp(16, return_residual=True)(x)[1] is x
    for activation in (F.sigmoid, F.silu, F.gelu):
        gated = GatedMlp(16, activation=activation, multiple_of=8)
        w1, b1, w2, b2 = (p.double() for p in gated.parameters())
        values, gates = (x.double() @ w1.T + b1).chunk(2, -1)
        close(gated(x), (values * activation(gates)) @ w2.T + b2)
        assert gated.fc1.out_features == 96  # 8/3 of 16 is 42, rounded up to 48; twice
    assert isinstance(FusedMLP(16), nn.Module)


def test_embeddings():
    ids = torch.tensor([[1, 2, 2], [0, 4, 1]])
    gpt = GPT2Embeddings(6, 5, 7, word_embed_proj_dim=4)
    w, p = gpt.word_embeddings.weight, gpt.position_embeddings.weight
    close(gpt(ids), w.double()[ids] @ gpt.project_in.weight.double().T + p.double()[:3])
    close(gpt(ids, ids), w.double()[ids] @ gpt.project_in.weight.double().T + p.double()[ids])
    assert GPT2Embeddings(6, 5, 0)(ids).shape == (2, 3, 6)
    bert = BertEmbeddings(6, 5, 7, 2)
    w, p, t = (e.weight for e in (bert.word_embeddings, bert.position_embeddings, bert.token_type_embeddings))
    close(bert(ids), (w[ids] + p[:3] + t[0]).double())
    types = torch.tensor([[0, 1, 1], [1, 0, 0]])
    close(bert(ids, token_type_ids=types), (w[ids] + p[:3] + t[types]).double())
    assert set(BertEmbeddings(6, 5, 0, 0).state_dict()) == {"word_embeddings.weight"}
    assert VocabParallelEmbedding(5, 6)(ids).shape == (2, 3, 6)


def keys(*names: str) -> set[str]:
    return {f"{name}.{kind}" for name in names for kind in ("weight", "bias")}


NAMES = {
    "MHA": (lambda: MHA(32, 4, rotary_emb_dim=8, use_flash_attn=True, use_alibi=True), keys("Wqkv", "out_proj")),
    "MHA cross": (lambda: MHA(32, 4, cross_attn=True), keys("Wq", "Wkv", "out_proj")),
    "MHA dwconv": (lambda: MHA(32, 4, dwconv=True), keys("Wqkv", "dwconv_qkv", "out_proj")),
    "MHA dwconv gqa": (
        lambda: MHA(32, 4, dwconv=True, num_heads_kv=2),
        keys("Wqkv", "dwconv_q", "dwconv_kv", "out_proj"),
    ),
    "FlashMHA": (lambda: FlashMHA(32, 4), keys("Wqkv", "out_proj")),
    "Mlp": (lambda: Mlp(8), keys("fc1", "fc2")),
    "GatedMlp": (lambda: GatedMlp(8), keys("fc1", "fc2")),
    "FusedMLP": (lambda: FusedMLP(8), keys("fc1", "fc2")),
    "Block": (
        lambda: Block(32, MIXER, MLP),
        keys("mixer.Wqkv", "mixer.out_proj", "norm1", "mlp.fc1", "mlp.fc2", "norm2"),
    ),
    "ParallelBlock": (
        lambda: ParallelBlock(32, MIXER, MLP, tied_norm=True),
        keys("mixer.Wqkv", "mixer.out_proj", "norm1", "mlp.fc1", "mlp.fc2"),
    ),
    "GPT2Embeddings": (
        lambda: GPT2Embeddings(8, 5, 4, word_embed_proj_dim=4),
        {"word_embeddings.weight", "project_in.weight", "position_embeddings.weight"},
    ),
    "BertEmbeddings": (
        lambda: BertEmbeddings(8, 5, 4, 2),
        {"word_embeddings.weight", "position_embeddings.weight", "token_type_embeddings.weight"},
    ),
}


@pytest.mark.parametrize("name", NAMES)
def test_names_in_a_state_dict(name):
    make, expected = NAMES[name]
    assert set(make().state_dict()) == expected


def test_parameters_come_in_the_originals_order():
    """Optimizers' states are kept by number."""
    names = [n for n, _ in Block(32, MIXER, MLP).named_parameters()]
    assert [n.removesuffix(".weight") for n in names if n.endswith("weight")] == [
        "mixer.Wqkv", "mixer.out_proj", "norm1", "mlp.fc1", "mlp.fc2", "norm2",
    ]  # fmt: skip
    cross = [n for n, _ in MHA(32, 4, cross_attn=True, dwconv=True, num_heads_kv=2).named_parameters()]
    assert cross[::2] == ["Wq.weight", "Wkv.weight", "dwconv_q.weight", "dwconv_kv.weight", "out_proj.weight"]


def test_marks_of_norms():
    block = Block(32, MIXER, MLP, sequence_parallel=True, mark_shared_params=True)
    marked = {n for n, p in block.named_parameters() if getattr(p, "_sequence_parallel", False)}
    assert marked == keys("norm1", "norm2")
    assert marked == {n for n, p in block.named_parameters() if getattr(p, "_shared_params", False)}
