"""A Flux of diffusers over several processes on our attention, against itself in one process.

    torchrun --nproc-per-node 2 tests/python/ecosystem/context_parallel.py

Ring attention merges parts by softmax_lse; Ulysses spreads heads. Both call our forward operator by the name that
diffusers imports. bf16: what is allowed are the roundings of as many partial results as there are processes.
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig, FluxTransformer2DModel
from flash_attn.integrations import diffusers as plus


def model() -> FluxTransformer2DModel:
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
    ).bfloat16()  # fmt: skip


def inputs() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    shapes = dict(
        hidden_states=(1, 16, 4), encoder_hidden_states=(1, 8, 32), pooled_projections=(1, 32), img_ids=(16, 3),
        txt_ids=(8, 3), timestep=(1,),
    )  # fmt: skip
    return {name: torch.randn(shape).bfloat16() for name, shape in shapes.items()}


@torch.no_grad()
def main() -> int:
    torch.accelerator.device_count = lambda: 1  # diffusers divides by it, and a CPU has none
    dist.init_process_group("gloo")
    plus.enable()
    alone = model()
    alone.set_attention_backend("flash")
    expected = alone(**inputs(), return_dict=False)[0]
    wrong = 0
    for kind in (dict(ring_degree=dist.get_world_size()), dict(ulysses_degree=dist.get_world_size())):
        spread = model()
        spread.set_attention_backend("flash")
        spread.enable_parallelism(config=ContextParallelConfig(**kind))
        error = (spread(**inputs(), return_dict=False)[0] - expected).abs().max().item()
        allowed = dist.get_world_size() * torch.finfo(torch.bfloat16).eps * expected.abs().max().item()
        print(f"rank {dist.get_rank()} {kind}: {error:.1e} of {allowed:.1e}", flush=True)
        wrong += not error <= allowed
    dist.destroy_process_group()
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
