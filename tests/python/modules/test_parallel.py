"""A model split over two processes, over Gloo, is the whole one: logits, gradients, tokens, weights."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from flash_attn.models.gpt import GPTLMHeadModel, combine_state_dicts_tp, shard_state_dict_tp
from flash_attn.modules.mha import ParallelMHA, get_alibi_slopes
from flash_attn.utils.distributed import allreduce_sequence_parallel_grad
from support.processes import in_processes

WORLD = 2
BASE = dict(
    vocab_size=10, max_position_embeddings=16, hidden_size=48, num_hidden_layers=2, num_attention_heads=6, n_head=6,
    n_inner=64, activation_function="gelu", layer_norm_epsilon=1e-5, initializer_range=0.02, scale_attn_weights=True,
    scale_attn_by_inverse_layer_idx=False, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0, use_flash_attn=True,
)  # fmt: skip
CASES = {
    "gpt2": dict(),
    # Three heads of keys for two processes: heads do not divide evenly.
    "llama": dict(activation_function="swiglu", n_head_kv=3, rotary_emb_fraction=1.0, rms_norm=True, mlp_multiple_of=8,
                  tie_word_embeddings=False, fused_dropout_add_ln=True),
    "alibi, fused": dict(activation_function="gelu_new", use_alibi=True, fused_mlp=True, max_position_embeddings=0,
                         window_size=(3, 0), pad_vocab_size_multiple=4),
}  # fmt: skip


def config_of(case: str, sequence_parallel: bool):
    return type("Config", (), dict(BASE, **CASES[case], sequence_parallel=sequence_parallel))


def close(a: torch.Tensor, b: torch.Tensor, name: str = "") -> None:
    assert a.shape == b.shape and (a - b).abs().max() <= 2e-5 * (1 + b.abs().max()), (name, (a - b).abs().max())


def check_model(rank: int, group, case: str, sequence_parallel: bool) -> None:
    config = config_of(case, sequence_parallel)
    torch.manual_seed(0)
    whole = GPTLMHeadModel(config)
    for p in whole.parameters():
        torch.nn.init.normal_(p, std=0.2)
    weights = whole.state_dict()
    shards = [shard_state_dict_tp(weights, config, WORLD, r) for r in range(WORLD)]
    assert all(x.equal(weights[name]) for name, x in combine_state_dicts_tp(shards, config).items())
    model = GPTLMHeadModel(config, process_group=group)
    model.load_state_dict(shards[rank])

    torch.manual_seed(1)  # ranks have drawn unequally many weights
    ids = torch.randint(0, 10, (2, 6))
    logits, exact = model(ids).logits, whole(ids).logits
    mine = exact.chunk(WORLD, dim=-1)[rank]
    close(logits.view_as(mine), mine)
    dlogits = torch.randn_like(exact)
    torch.autograd.backward(exact, dlogits)
    torch.autograd.backward(logits, dlogits.chunk(WORLD, dim=-1)[rank].reshape(logits.shape))
    if sequence_parallel:
        allreduce_sequence_parallel_grad(model, group)
    grads = shard_state_dict_tp({n: p.grad for n, p in whole.named_parameters()}, config, WORLD, rank)
    assert set(grads) == {n for n, _ in model.named_parameters()}
    for name, p in model.named_parameters():
        close(p.grad, grads[name], name)
    if not sequence_parallel:
        tokens = whole.eval().generate(ids, max_length=12, vocab_size=10)
        assert model.eval().generate(ids, max_length=12, vocab_size=10, tensor_parallel=WORLD).equal(tokens)
    else:
        with pytest.raises(NotImplementedError, match="need sequence_parallel=False"):
            model.generate(ids, max_length=12)


def check_layer(rank: int, group) -> None:
    layer = ParallelMHA(48, 6, group, num_heads_kv=3, use_flash_attn=True, use_alibi=True, sequence_parallel=False)
    assert (layer.num_heads_per_rank, layer.num_heads_kv_per_rank) == ((4, 2), (2, 1))[rank]
    slopes = get_alibi_slopes(6)
    assert torch.equal(layer.inner_attn.alibi_slopes, torch.tensor((slopes[:4], slopes[4:])[rank]))
    torch.manual_seed(3)
    x, cu_seqlens = torch.randn(7, 48), torch.tensor([0, 3, 7]).int()
    packed = layer(x, cu_seqlens=cu_seqlens, max_seqlen=4)
    close(packed, torch.cat([layer(part[None])[0] for part in x.split([3, 4])]))
    with pytest.raises(ValueError, match="cu_seqlens: need"):
        layer(x, cu_seqlens=cu_seqlens)


def worker(rank: int) -> None:
    for case in CASES:
        for sequence_parallel in (False, True):
            check_model(rank, dist.group.WORLD, case, sequence_parallel)
    check_layer(rank, dist.group.WORLD)


def test_two_processes(tmp_path) -> None:
    in_processes(worker, WORLD, tmp_path)


def test_sizes_that_do_not_divide() -> None:
    config = config_of("gpt2", True)
    with pytest.raises(ValueError, match="vocab_size: expected a multiple of world_size = 3, got 10"):
        shard_state_dict_tp({}, config, 3, 0)
