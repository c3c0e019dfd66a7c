"""Masks and biases: which argument says what, each checked against the mask written out.

What one learns: structured masks (causal, window, chunk) are numbers and cost less than nothing, as what they hide is
skipped; everything else is a bias, of which only the last dimension has to be there; and a bias can be learnt.
"""

import sys

import torch
from flash_attn import flash_attn_func

torch.manual_seed(0)
seqlen_q, seqlen_k, nheads, headdim = 48, 64, 4, 32  # fewer queries than keys: the last query stands at the last key
q = torch.randn(2, seqlen_q, nheads, headdim)
k, v = torch.randn(2, 2, seqlen_k, nheads, headdim)
at = torch.arange(seqlen_q)[:, None] + seqlen_k - seqlen_q  # where each query stands
key = torch.arange(seqlen_k)
distance = (at - key).abs()


def written_out(bias: torch.Tensor) -> torch.Tensor:
    """bias is added to the scores, -inf where a key is hidden; broadcast to (batch, nheads, seqlen_q, seqlen_k)."""
    q64, k64, v64 = (x.double() for x in (q, k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q64, k64) * headdim**-0.5 + bias
    return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v64)


def hide(sees: torch.Tensor) -> torch.Tensor:
    """True: sees -> 0, else -inf."""
    return torch.zeros(sees.shape).masked_fill(~sees, float("-inf"))


slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625])
sink = torch.randn(nheads)
lengths = torch.tensor([64, 50])
padding = hide(key < lengths[:, None])[:, None, None]  # (batch, 1, 1, seqlen_k): the same for heads and queries
prefix = hide((key <= at) | (key < 16))[None, None]  # all see the first 16 keys, and causally the rest
relative = torch.randn(nheads, 2 * seqlen_k)[:, at - key + seqlen_k][None]  # T5's: a number per head and distance

cases = {
    "causal": ({"causal": True}, hide(key <= at)),
    "itself and 15 before": ({"window_size": (15, 0)}, hide((key <= at) & (distance < 16))),
    "8 keys on either side": ({"window_size": (8, 8)}, hide(distance <= 8)),
    "its own chunk of 16": ({"attention_chunk": 16, "causal": True}, hide((key // 16 == at // 16) & (key <= at))),
    "ALiBi": ({"causal": True, "alibi_slopes": slopes}, hide(key <= at) - slopes[:, None, None] * distance),
    "padding as a bias": ({"attn_bias": padding}, padding),
    "a prefix that all see": ({"attn_bias": prefix}, prefix),
    "relative positions": ({"attn_bias": relative}, relative),
    "both": ({"attn_bias": relative, "window_size": (31, 0)}, relative + hide((key <= at) & (distance < 32))),
}
worst = 0.0
for name, (arguments, bias) in cases.items():
    difference = (flash_attn_func(q, k, v, **arguments) - written_out(bias)).abs().max().item()
    print(f"{name:24} {', '.join(arguments):26} {difference:.1e}")
    worst = max(worst, difference)

# A sink is a key without a value: a row may give its weight to nothing.
with_sink = flash_attn_func(q, k, v, learnable_sink=sink)
_, lse, _ = flash_attn_func(q, k, v, return_attn_probs=True)  # (batch, nheads, seqlen_q)
share = torch.sigmoid(lse - sink[:, None]).transpose(1, 2)[..., None]  # what the sink leaves to the keys
difference = (with_sink - share * flash_attn_func(q, k, v)).abs().max().item()
print(f"{'sink':24} {'learnable_sink':26} {difference:.1e}")
worst = max(worst, difference)

# The gradient of a bias of one row for all is the sum over batch, heads and queries.
shared = torch.zeros(1, 1, 1, seqlen_k, requires_grad=True)
flash_attn_func(q, k, v, attn_bias=shared)[..., 0].sum().backward()
reference = torch.zeros(1, 1, 1, seqlen_k, dtype=torch.float64, requires_grad=True)
written_out(reference)[..., 0].sum().backward()
gradient = (shared.grad - reference.grad).abs().max().item()
print(f"{'gradient of a bias':24} {'attn_bias':26} {gradient:.1e}")
if not (worst < 1e-5 and gradient < 1e-4):
    sys.exit("A mask or a bias means something else than what is written out.")
