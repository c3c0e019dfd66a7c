"""A small GPT over bytes, trained on packed passages of ragged length: no padding, one attention call for all."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from flash_attn import flash_attn_varlen_qkvpacked_func
from muon import Muon
from text import Batch, pack
from torch import Tensor, nn

# qkv (total, 3, nheads, headdim), cu_seqlens (batch + 1) int32, max_seqlen -> (total, nheads, headdim)
Attention = Callable[[Tensor, Tensor, int], Tensor]


def flash(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    return flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, max_seqlen, causal=True)


def sdpa(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """The same by PyTorch's own attention, passage by passage: what `flash` is compared with."""
    passages = qkv.split(cu_seqlens.diff().tolist())
    heads_first = (passage.permute(1, 2, 0, 3) for passage in passages)  # (3, nheads, seqlen, headdim)
    outs = [F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True) for q, k, v in heads_first]
    return torch.cat([out[0].transpose(0, 1) for out in outs])


@dataclass(frozen=True)
class Config:
    layers: int = 3
    nheads: int = 4
    headdim: int = 32
    context: int = 256
    vocabulary: int = 256

    @property
    def width(self) -> int:
        return self.nheads * self.headdim


class Block(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        width = config.width
        self.config = config
        self.before_attention = nn.LayerNorm(width, bias=False)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.before_mlp = nn.LayerNorm(width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, batch: Batch, attention: Attention) -> Tensor:
        qkv = self.qkv(self.before_attention(x)).unflatten(-1, (3, self.config.nheads, self.config.headdim))
        qkv = rotate(qkv, cos, sin)
        x = x + self.out(attention(qkv, batch.cu_seqlens, batch.max_seqlen).flatten(1))
        return x + self.down(F.relu(self.up(self.before_mlp(x))).square())


def rotate(qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions: turns the halves of every q and k by the angles of its place; v stays as it is."""
    first, second = qkv[:, :2].chunk(2, dim=-1)  # (total, 2, nheads, headdim / 2)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return torch.cat([turned, qkv[:, 2:]], dim=1)


class GPT(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width, bias=False)
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)
        frequency = 1000.0 ** (-torch.arange(0, config.headdim, 2, dtype=torch.float64) / config.headdim)
        angles = torch.arange(config.context, dtype=torch.float64)[:, None] * frequency  # (context, headdim / 2)
        self.register_buffer("cos", angles.cos().float(), persistent=False)
        self.register_buffer("sin", angles.sin().float(), persistent=False)
        nn.init.normal_(self.embedding.weight, std=0.5)
        nn.init.zeros_(self.head.weight)  # the first guess: every byte alike, 8 bits
        for block in self.blocks:
            nn.init.zeros_(block.out.weight)
            nn.init.zeros_(block.down.weight)

    def forward(self, batch: Batch, attention: Attention = flash) -> Tensor:
        """Logits (total, vocabulary) of the byte that follows each token."""
        x = self.embedding(batch.tokens)
        cos, sin = (table[batch.positions][:, None, None] for table in (self.cos, self.sin))
        for block in self.blocks:
            x = block(x, cos, sin, batch, attention)
        return self.head(self.norm(x))

    def loss(self, batch: Batch, attention: Attention = flash) -> Tensor:
        return F.cross_entropy(self(batch, attention), batch.targets)

    def parameter_count(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())


@dataclass(frozen=True)
class Step:
    number: int
    seconds: float  # since the start
    train: float  # bits per byte
    held_out: float | None  # bits per byte, where it was measured


def train(
    model: GPT,
    draw: Callable[[], Batch],
    held_out: Batch,
    *,
    seconds: float,
    steps: int,
    evaluate_every: int = 25,
) -> Iterator[Step]:
    """Trains for `seconds` or `steps`, whichever ends first; the learning rates follow that progress down to zero."""
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if not any(p is matrix for matrix in matrices)]
    optimizers = [Muon(matrices, lr=0.02), torch.optim.AdamW(others, lr=0.006, betas=(0.9, 0.98), weight_decay=0.0)]
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    peaks = [group["lr"] for group in groups]
    bits = 1 / math.log(2)

    def measure() -> float:
        with torch.no_grad():
            return model.loss(held_out).item() * bits

    start = time.perf_counter()
    yield Step(0, 0.0, held := measure(), held)
    number, progress = 0, 0.0
    while progress < 1.0:
        warmup = min(1.0, (number + 1) / 20)
        for group, peak in zip(groups, peaks, strict=True):
            group["lr"] = peak * warmup * (1.0 - progress)
        loss = model.loss(draw())
        model.zero_grad(set_to_none=True)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        number += 1
        elapsed = time.perf_counter() - start
        progress = max(number / steps, elapsed / seconds)
        measured = measure() if number % evaluate_every == 0 or progress >= 1.0 else None
        yield Step(number, elapsed, loss.item() * bits, measured)


@torch.no_grad()
def sample(model: GPT, prompts: list[bytes], length: int, temperature: float, seed: int) -> Iterator[list[int]]:
    """`length` times the next byte of each prompt. What is in view is computed anew: prompts of any lengths, packed."""
    generator = torch.Generator().manual_seed(seed)
    texts = [list(prompt) for prompt in prompts]
    for _ in range(length):
        batch = pack([bytes([*text[-model.config.context :], 0]) for text in texts]).to(model.cos.device)
        last = batch.cu_seqlens[1:].long() - 1
        chances = (model(batch)[last] / temperature).softmax(-1).cpu()
        drawn = torch.multinomial(chances, 1, generator=generator).flatten().tolist()
        for text, byte in zip(texts, drawn, strict=True):
            text.append(byte)
        yield drawn
