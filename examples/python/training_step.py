"""A training step: a small causal language model learns in bf16, padded batches packed, and its gradient is checked.

What one learns: where dropout and the loss belong, that no mask is needed for padding, and how to test that the step is
right: its gradient against the same model with attention written out in float64.
"""

import copy
import sys

import torch
import torch.nn.functional as F
from flash_attn import flash_attn_varlen_qkvpacked_func
from flash_attn.bert_padding import unpad_input
from torch import nn

VOCABULARY, WIDTH, NHEADS = 32, 64, 4


def flash(qkv: torch.Tensor, cu_seqlens: torch.Tensor, longest: int) -> torch.Tensor:
    """qkv (total, 3, nheads, headdim) -> (total, nheads, headdim)"""
    return flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, longest, causal=True)


def written_out(qkv: torch.Tensor, cu_seqlens: torch.Tensor, longest: int) -> torch.Tensor:
    """The same as a formula, a sequence at a time."""
    outs = []
    for part in qkv.split(cu_seqlens.diff().tolist()):
        q, k, v = (x.transpose(0, 1) for x in part.unbind(1))  # (nheads, seqlen, headdim)
        scores = q @ k.transpose(1, 2) * q.shape[-1] ** -0.5
        scores = scores.masked_fill(torch.ones_like(scores[0], dtype=torch.bool).triu(1), float("-inf"))
        outs.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(outs)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.norm, self.out_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)
        self.attend = flash

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """tokens, mask (batch, seqlen) -> the loss of each token from those before it."""
        # Padding goes away here and never comes back: rows of it cost nothing and can't leak.
        packed, _, cu_seqlens, longest, _ = unpad_input(tokens[..., None], mask)
        packed = packed[:, 0]
        x = self.embedding(packed)
        qkv = self.qkv(self.norm(x)).unflatten(-1, (3, NHEADS, -1))
        x = x + self.out(self.attend(qkv, cu_seqlens, longest).flatten(1))
        logits = self.head(self.out_norm(x))
        followed = torch.ones(len(packed), dtype=torch.bool)
        followed[cu_seqlens[1:].long() - 1] = False  # the last token of a sequence has no next one
        return F.cross_entropy(logits[:-1][followed[:-1]].float(), packed[1:][followed[:-1]])


torch.manual_seed(0)
lengths = torch.tensor([40, 7, 25, 33])
mask = torch.arange(40) < lengths[:, None]  # (batch, seqlen)
tokens = (torch.arange(40) * 3 + torch.arange(4)[:, None]) % VOCABULARY  # a pattern to be learnt

model = Model().to(torch.bfloat16)
exact = copy.deepcopy(model).double()
exact.attend = written_out
model(tokens, mask).backward()
exact(tokens, mask).backward()
pairs = list(zip(model.parameters(), exact.parameters(), strict=True))
worst = max(((p.grad - e.grad).norm() / e.grad.norm()).item() for p, e in pairs)
print(f"the gradient of {len(pairs)} parameters in bf16: at most {worst:.2%} from the model in float64")

model = Model()  # weights in fp32, as one trains; attention runs in the dtype that it is given
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
losses = []
for _ in range(40):
    optimizer.zero_grad()
    loss = model(tokens, mask)
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f} in {len(losses)} steps")
if not (worst < 0.05 and losses[-1] < losses[0] / 5):
    sys.exit("The gradient is wrong, or nothing was learnt.")
