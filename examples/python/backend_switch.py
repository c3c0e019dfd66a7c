"""Who computes: what backends there are, which one a call would take and why, and how to choose another."""

import sys

import flash_attn
import torch

for backend in flash_attn.backends():
    print(f"{backend.name:10} {backend.unavailable or 'usable'}: {backend.description}")

q, k, v = (torch.randn(1, 128, 4, 64) for _ in range(3))
alibi_slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625])
options = {"causal": True, "window_size": (64, 0), "softcap": 30.0, "alibi_slopes": alibi_slopes}

# What a call would do, without doing it.
print(f"\n{flash_attn.explain(q, k, v, **options)}\n")

out = flash_attn.flash_attn_func(q, k, v, **options)

# Within the block every call runs there, or fails. FLASH_ATTENTION_BACKEND=reference does the same for a whole program.
with flash_attn.backend("reference"):
    chosen = [c.backend for c in flash_attn.explain(q, k, v, **options).candidates if c.chosen]
    exact = flash_attn.flash_attn_func(q, k, v, **options)

difference = (out - exact).abs().max().item()
print(f"within the block: {', '.join(chosen)}; the largest difference between the two: {difference:.1e}")
if chosen != ["reference"] or not difference < 1e-5:
    sys.exit("The switch did not switch, or the backends disagree.")
