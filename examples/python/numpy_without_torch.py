"""Attention of NumPy arrays, forward and backward, and a few steps of learning with it: no PyTorch is needed."""

import sys

import flash_attn
import numpy as np

rng = np.random.default_rng(0)
q, k, v = (rng.standard_normal((2, 256, 8, 64), dtype=np.float32) for _ in range(3))  # (batch, seqlen, nheads, headdim)
out, lse = flash_attn.attention(q, k, v, causal=True, return_lse=True)

scores = np.einsum("bihd,bjhd->bhij", q.astype(np.float64), k) / 8 + np.triu(np.full((256, 256), -np.inf), 1)
weights = np.exp(scores - scores.max(-1, keepdims=True))
exact = np.einsum("bhij,bjhd->bihd", weights / weights.sum(-1, keepdims=True), v)
difference = abs(out - exact).max()
print(f"{type(out).__name__} {out.shape}, the largest difference from the formula in float64: {difference:.1e}")

# Moves the values, by the gradient of a squared distance, until attention gives what is wanted.
wanted = rng.standard_normal(out.shape, dtype=np.float32) / 16
distances = []
for _ in range(50):
    out, lse = flash_attn.attention(q, k, v, causal=True, return_lse=True)
    dout = out - wanted
    distances.append(float((dout**2).mean()))
    v -= 0.2 * flash_attn.attention_backward(dout, q, k, v, out, lse, causal=True).dv
print(f"mean squared distance {distances[0]:.4f} -> {distances[-1]:.4f} in {len(distances)} steps")
if not (difference < 1e-5 and distances[-1] < distances[0] / 4):
    sys.exit("Attention, or its gradient, is wrong.")
