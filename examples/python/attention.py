"""The first call: attention by flash_attn, compared with PyTorch's own."""

import sys

import torch
import torch.nn.functional as F
from flash_attn import flash_attn_func

q, k, v = (torch.randn(2, 512, 8, 64) for _ in range(3))  # (batch, seqlen, nheads, headdim)
out = flash_attn_func(q, k, v, causal=True)

heads_first = (x.transpose(1, 2) for x in (q, k, v))  # as PyTorch wants them
expected = F.scaled_dot_product_attention(*heads_first, is_causal=True).transpose(1, 2)
difference = (out - expected).abs().max().item()
print(f"out {tuple(out.shape)}, the largest difference from PyTorch's: {difference:.1e}")
if not difference < 1e-5:
    sys.exit("They differ by more than float32 arithmetic explains.")
