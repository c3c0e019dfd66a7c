"""Under torch.set_default_device: what the package makes for itself lies where it has to, whatever the default is."""

from __future__ import annotations

import ast
from pathlib import Path

import flash_attn
import pytest
import torch
from flash_attn import bert_padding
from flash_attn.cute.compute_block_sparsity import compute_block_sparsity
from flash_attn.cute.interface import flash_attn_func as cute_attention
from flash_attn.layers.rotary import apply_rotary_emb
from flash_attn.losses.cross_entropy import CrossEntropyLoss
from flash_attn.models.vit import VisionTransformer
from flash_attn.ops.triton.layer_norm import rms_norm_fn

MAKERS = {
    "arange", "asarray", "as_tensor", "empty", "empty_strided", "eye", "full", "linspace", "logspace", "normal", "ones",
    "rand", "randint", "randn", "randperm", "range", "scalar_tensor", "tensor", "tril_indices", "triu_indices", "zeros",
}  # fmt: skip
PACKAGE = Path(flash_attn.__file__).parent


def unnamed(tree: ast.AST) -> list[int]:
    """Lines that make a tensor and name no device, but for parameters of modules: they are made on the default."""
    parameters = {
        id(x) for call in ast.walk(tree) if isinstance(call, ast.Call) and ast.unparse(call.func) == "nn.Parameter"
        for x in ast.walk(call)
    }  # fmt: skip
    return [
        call.lineno for call in ast.walk(tree)
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr in MAKERS
        and ast.unparse(call.func.value) == "torch" and id(call) not in parameters
        and not any(k.arg in ("device", None) for k in call.keywords)
    ]  # fmt: skip


def test_every_tensor_is_made_on_a_device_that_is_named():
    assert unnamed(ast.parse("x = torch.zeros(3); y = torch.ones(2, device=d); z = nn.Parameter(torch.empty(1))")) == [
        1
    ]
    files = [p for p in PACKAGE.rglob("*.py") if "_verify" not in p.parts]  # a program of its own
    found = {str(p.relative_to(PACKAGE)): lines for p in files if (lines := unnamed(ast.parse(p.read_text())))}
    assert len(files) > 100 and not found


Q, K, V = (torch.randn(2, n, 4, 16) for n in (24, 40, 40))
MASK = torch.arange(24) < torch.tensor([[24], [9]])
CU = torch.tensor([0, 20, 48], dtype=torch.int32)
COS, SIN = torch.rand(2, 24, 8)
LABELS = torch.arange(24)
SLOPES = torch.tensor([0.5, 0.25, 0.1, 0.0])
BIAS, SINK = torch.randn(4, 24, 40), torch.randn(4)


def mask_mod(b, h, i, j):
    return (j <= i) & (j > i - 20)


def sparse(q):
    lists = compute_block_sparsity(16, 16, 2, 1, 24, 40, mask_mod, None, q.device)
    return cute_attention(q, K, V, mask_mod=mask_mod, block_sparse_tensors=lists)[0]


def decoded(q):
    cache = [x.clone() for x in (K, V)]
    new = [x[:, :1] for x in (K, V)]
    used = torch.tensor([3, 20], dtype=torch.int32, device="cpu")
    return flash_attn.flash_attn_with_kvcache(q[:, :1], *cache, *new, COS, SIN, cache_seqlens=used, causal=True)


def padded(q):
    rows, indices, cu, longest, _ = bert_padding.unpad_input(q, MASK)
    out = flash_attn.flash_attn_varlen_func(rows, rows, rows, cu, cu, longest, longest)
    return bert_padding.pad_input(out, indices, 2, 24)


CALLS = {
    "dropout": lambda q: flash_attn.flash_attn_func(q, K, V, 0.3, causal=True, alibi_slopes=SLOPES),
    "bias, sink": lambda q: flash_attn.flash_attn_func(q, K, V, attn_bias=BIAS[None], learnable_sink=SINK),
    "packed": lambda q: flash_attn.flash_attn_varlen_func(*[q.flatten(0, 1)] * 3, CU, CU, 28, 28, window_size=(5, 0)),
    "padded": padded,
    "a step": decoded,
    "lists of blocks": sparse,
    "score_mod": lambda q: cute_attention(q, K, V, score_mod=lambda s, b, h, i, j: s + BIAS[h, i, j])[0],
    "rotary": lambda q: apply_rotary_emb(q, COS, SIN),
    "norm": lambda q: rms_norm_fn(q, SINK[:1].expand(16), None, residual=q),
    "cross entropy": lambda q: CrossEntropyLoss()(q[0].flatten(1), LABELS),
}


@pytest.mark.parametrize("backend", [None, "torch"])
@pytest.mark.parametrize("case", CALLS)
def test_results_and_gradients_are_the_same(case, backend):
    def results():
        torch.manual_seed(1)
        q = Q.clone().requires_grad_(case != "a step")
        out = CALLS[case](q)
        return [out.detach(), *(torch.autograd.grad(out.square().sum(), q) if q.requires_grad else ())]

    with flash_attn.use_backend(backend):
        expected = results()
        with torch.device("meta"):
            got = results()
    assert all(map(torch.equal, got, expected))


def test_models_are_made_on_it():
    with torch.device("meta"):
        model = VisionTransformer(depth=2, embed_dim=32, num_heads=2, num_classes=5, drop_path_rate=0.1)
    assert all(p.is_meta for p in model.parameters())
