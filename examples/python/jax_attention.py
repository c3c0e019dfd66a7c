"""Attention inside a jitted and differentiated JAX function, on the CPU, and over a batch made by vmap."""

import sys

import flash_attn
import jax
import jax.numpy as jnp


def plain(q, k, v):
    """The same in JAX's own operations."""
    scores = jnp.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
    seen = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    return jnp.einsum("bhij,bjhd->bihd", jax.nn.softmax(jnp.where(seen, scores, -jnp.inf)), v)


def ours(q, k, v):
    return flash_attn.jax.attention(q, k, v, causal=True)


def step(attention):
    """A loss and its gradient, compiled as one program of XLA."""
    return jax.jit(jax.value_and_grad(lambda q, k, v: (attention(q, k, v) ** 2).sum(), argnums=(0, 1, 2)))


keys = jax.random.split(jax.random.key(0), 3)
q, k, v = (jax.random.normal(key, (2, 256, 8, 64)) for key in keys)  # (batch, seqlen, nheads, headdim)
(loss, gradients), (expected, expected_gradients) = step(ours)(q, k, v), step(plain)(q, k, v)
differences = [abs(float(loss / expected) - 1)]
differences += [float(abs(a - b).max()) for a, b in zip(gradients, expected_gradients, strict=True)]
print("loss (relative), dq, dk, dv differ from JAX's own by", ", ".join(f"{d:.1e}" for d in differences))

mapped = jax.vmap(ours, in_axes=(0, None, None))(jnp.stack([q, 2 * q, -q]), k, v)  # one call: batches are joined
differences.append(float(abs(mapped[1] - ours(2 * q, k, v)).max()))
print(f"vmap gives {mapped.shape}, as one call after the other does: {differences[-1]:.1e}")
if not max(differences) < 1e-4:
    sys.exit("They differ by more than float32 arithmetic explains.")
