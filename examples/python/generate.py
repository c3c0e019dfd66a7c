"""Generation with a paged cache: a batch whose sequences end at different times, pages handed out and taken back.

What one learns: who owns what. The caller has the pages, the table of whose they are, and the lengths; one call a step
writes the new keys, rotates, and attends. Afterwards every sequence is generated again alone, without a cache.
"""

import sys

import torch
from flash_attn import flash_attn_func, flash_attn_with_kvcache
from torch import nn

VOCABULARY, NHEADS, NHEADS_K, HEADDIM, PAGE, MAX_PAGES, END = 64, 8, 2, 32, 16, 8, 0


class Pages:
    """A pool of pages, and the table of those that each sequence has."""

    def __init__(self, pages: int, batch: int):
        self.k, self.v = torch.zeros(2, pages, PAGE, NHEADS_K, HEADDIM)
        self.free = list(range(pages))
        self.table = torch.zeros(batch, MAX_PAGES, dtype=torch.int32)
        self.lengths = torch.zeros(batch, dtype=torch.int32)

    def reserve(self, b: int, tokens: int) -> None:
        """Room for that many tokens more in sequence b."""
        used = int(self.lengths[b])
        for page in range(-(-used // PAGE), -(-(used + tokens) // PAGE)):
            self.table[b, page] = self.free.pop()

    def release(self, b: int) -> None:
        self.free += self.table[b, : -(-int(self.lengths[b]) // PAGE)].tolist()
        self.lengths[b] = 0


class Model(nn.Module):
    """One layer, with rotary positions: enough to generate."""

    def __init__(self):
        super().__init__()
        width = NHEADS * HEADDIM
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * NHEADS_K * HEADDIM)
        self.head = nn.Linear(width, VOCABULARY)
        angle = torch.arange(MAX_PAGES * PAGE)[:, None] / 10000 ** (torch.arange(HEADDIM // 2) / (HEADDIM // 2))
        self.cos, self.sin = angle.cos(), angle.sin()  # (position, headdim / 2)

    def project(self, tokens: torch.Tensor):
        """tokens (batch, n) -> x, q (batch, n, nheads, headdim), k and v (batch, n, nheads_k, headdim)"""
        x = self.embedding(tokens)
        return x, self.q(x).unflatten(-1, (NHEADS, -1)), *self.kv(x).unflatten(-1, (2, NHEADS_K, -1)).unbind(2)

    def step(self, tokens: torch.Tensor, pages: Pages, rows: torch.Tensor) -> torch.Tensor:
        """New tokens (len(rows), n) of the sequences `rows` of the pool -> the next token of each."""
        x, q, k, v = self.project(tokens)
        lengths, table = pages.lengths[rows], pages.table[rows]
        out = flash_attn_with_kvcache(
            q, pages.k, pages.v, k, v, self.cos, self.sin, lengths, block_table=table, causal=True,
            rotary_interleaved=False,
        )  # fmt: skip
        pages.lengths[rows] += tokens.shape[1]
        return self.head(x + out.flatten(2))[:, -1].argmax(-1)

    def alone(self, tokens: torch.Tensor) -> int:
        """The next token after tokens (n), from the whole sequence."""
        x, q, k, v = self.project(tokens[None])
        out = flash_attn_func(self.rotate(q), self.rotate(k), v, causal=True)
        return int(self.head(x + out.flatten(2))[0, -1].argmax())

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        a, b = x.chunk(2, -1)
        cos, sin = self.cos[: x.shape[1], None], self.sin[: x.shape[1], None]
        return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


torch.manual_seed(1)
model = Model().eval()
prompts = [torch.randint(1, VOCABULARY, (n,)) for n in (20, 3, 37, 11)]
limits = [24, 40, 9, 17]  # tokens to generate at most
pages = Pages(14, len(prompts))  # fewer than all sequences would take at their longest: they must be taken back
sequences = [p.tolist() for p in prompts]
most = 0

with torch.no_grad():
    for b, prompt in enumerate(prompts):  # prompts have unlike lengths: one call each, here
        pages.reserve(b, len(prompt))
        sequences[b].append(int(model.step(prompt[None], pages, torch.tensor([b]))[0]))
    running = list(range(len(prompts)))
    while running:
        for b in running:
            pages.reserve(b, 1)
        most = max(most, len(pages.table.unique()))
        last = torch.tensor([[sequences[b][-1]] for b in running])
        for b, token in zip(running, model.step(last, pages, torch.tensor(running)).tolist(), strict=True):
            sequences[b].append(token)
        for b in [b for b in running if sequences[b][-1] == END or len(sequences[b]) == len(prompts[b]) + limits[b]]:
            pages.release(b)
            running.remove(b)

    wrong = 0
    for prompt, sequence in zip(prompts, sequences, strict=True):
        for n in range(len(prompt), len(sequence)):
            wrong += model.alone(torch.tensor(sequence[:n])) != sequence[n]

generated = sum(map(len, sequences)) - sum(map(len, prompts))
print(f"{generated} tokens of {len(prompts)} sequences in a pool of {len(pages.k)} pages; all pages came back")
print(f"tokens that a whole causal call would have chosen otherwise: {wrong}")
if wrong or sorted(pages.free) != list(range(len(pages.k))):
    sys.exit("The cache changed what is generated, or lost a page.")
