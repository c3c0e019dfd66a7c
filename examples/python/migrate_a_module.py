"""A real module, migrated step by step: the attention of a GPT block, as people write it, comes here in four steps.

What one learns: what each step replaces and what it saves, and that weights and results stay: every step is compared
with the module before all of them, outputs and gradients, on a padded batch.
"""

import math
import sys

import torch
from flash_attn import flash_attn_qkvpacked_func, flash_attn_varlen_qkvpacked_func
from flash_attn.bert_padding import pad_input, unpad_input
from torch import nn
from torch.nn import functional as F


class Original(nn.Module):
    """As it was: three projections, a mask of seqlen x seqlen, scores as a whole."""

    def __init__(self, width: int, nheads: int, dropout: float = 0.0):
        super().__init__()
        self.nheads, self.p = nheads, dropout
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
        """x (batch, seqlen, width), padding (batch, seqlen): True is a token -> (batch, seqlen, width)"""
        batch, seqlen, width = x.shape
        q, k, v = self.qkv(x).chunk(3, -1)
        q, k, v = (t.view(batch, seqlen, self.nheads, -1).transpose(1, 2) for t in (q, k, v))
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])  # (batch, nheads, seqlen, seqlen)
        causal = torch.ones(seqlen, seqlen, dtype=torch.bool, device=x.device).tril()
        scores = scores.masked_fill(~(causal & padding[:, None, None]), float("-inf"))
        weights = F.dropout(scores.softmax(-1), self.p, self.training)
        return self.out((weights @ v).transpose(1, 2).reshape(batch, seqlen, width))


class Step1(Original):
    """The formula becomes one call. No transpositions: heads come after the sequence here, as the projection has them.

    Saves: memory of batch x nheads x seqlen x seqlen, several times.
    """

    def forward(self, x, padding):
        qkv = self.qkv(x).unflatten(-1, (3, self.nheads, -1))  # (batch, seqlen, 3, nheads, headdim)
        hidden = torch.zeros(padding.shape, dtype=x.dtype).masked_fill(~padding, float("-inf"))[:, None, None]
        p = self.p if self.training else 0.0
        out = flash_attn_qkvpacked_func(qkv, dropout_p=p, causal=True, attn_bias=hidden)
        return self.out(out.flatten(2))


class Step2(Original):
    """Padding on the right needs no mask: causally, no token sees what comes after it. The rows of padding hold numbers
    that nobody may look at, as before.

    Saves: the bias.
    """

    def forward(self, x, padding):
        qkv = self.qkv(x).unflatten(-1, (3, self.nheads, -1))
        out = flash_attn_qkvpacked_func(qkv, dropout_p=self.p if self.training else 0.0, causal=True)
        return self.out(out.flatten(2))


class Step3(Original):
    """Tokens are packed, padding is not computed at all; also right for padding on the left or in between.

    Saves: the work on padding, in projections too.
    """

    def forward(self, x, padding):
        tokens, indices, cu_seqlens, longest, _ = unpad_input(x, padding)  # (total, width)
        qkv = self.qkv(tokens).unflatten(-1, (3, self.nheads, -1))
        p = self.p if self.training else 0.0
        out = flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, longest, dropout_p=p, causal=True)
        return pad_input(self.out(out.flatten(1)), indices, *x.shape[:2])


class Step4(Original):
    """The model packs once, and all its layers take packed tokens: pack and unpack are the first and the last line.

    Saves: packing in each layer.
    """

    def forward(self, tokens, cu_seqlens, longest):
        qkv = self.qkv(tokens).unflatten(-1, (3, self.nheads, -1))
        p = self.p if self.training else 0.0
        return self.out(flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, longest, dropout_p=p, causal=True).flatten(1))


def packed_once(layer: Step4):
    """A model of one layer that is packed once."""

    def model(x, padding):
        tokens, indices, cu_seqlens, longest, _ = unpad_input(x, padding)
        return pad_input(layer(tokens, cu_seqlens, longest), indices, *x.shape[:2])

    return model


torch.manual_seed(0)
x = torch.randn(3, 64, 128, requires_grad=True)
dout = torch.randn(3, 64, 128)
padding = torch.arange(64) < torch.tensor([[64], [9], [40]])
original = Original(128, 4)
weights = original.state_dict()  # the names stay, so that a checkpoint fits every step


def results(module: nn.Module, call) -> list[torch.Tensor]:
    """Rows of tokens of the output, and the gradients of x and of the weights."""
    out = call(x, padding)[padding]
    return [out.detach(), *torch.autograd.grad(out, [x, *module.parameters()], dout[padding])]


expected = results(original, original)
worst = 0.0
for step in (Step1, Step2, Step3, Step4):
    module = step(128, 4)
    module.load_state_dict(weights)
    found = results(module, packed_once(module) if step is Step4 else module)
    differences = [((a - b).norm() / b.norm()).item() for a, b in zip(found, expected, strict=True)]
    print(
        f"{step.__name__}: output {differences[0]:.1e}, gradients at most {max(differences[1:]):.1e} from the original"
    )
    worst = max(worst, *differences)
if not worst < 1e-5:
    sys.exit("A step changed what the module computes.")
