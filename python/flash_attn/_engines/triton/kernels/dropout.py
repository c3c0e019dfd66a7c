"""Dropout is a function of position: the entries of src/core/dropout.hpp, philox4x32-10, eight keys to a draw."""

import triton
import triton.language as tl


@triton.jit
def multiply(a, b: tl.constexpr):
    """The high and the low half of a product of 32 bits."""
    product = a.to(tl.uint64) * b
    return (product >> 32).to(tl.uint32), product.to(tl.uint32)


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    for _ in tl.static_range(10):
        high_a, low_a = multiply(c0, 0xD2511F53)
        high_b, low_b = multiply(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def seed_of(state, seed, offset):
    """(seed, offset) as the generator's key and last counter. Drawn by torch, they are in the device's memory."""
    if state is not None:
        seed = tl.load(state)
        offset = tl.load(state + 1)
    seed = seed.to(tl.uint64)
    offset = offset.to(tl.uint64)
    high = (seed >> 32).to(tl.uint32) ^ (offset >> 32).to(tl.uint32)
    return seed.to(tl.uint32), high, offset.to(tl.uint32)


@triton.jit
def kept(i, n, plane, k0, k1, last, threshold, ROWS: tl.constexpr, KEYS: tl.constexpr):
    """(ROWS, KEYS) bool: the entries of rows i (ROWS) and keys n + [0, KEYS) that stay; n a multiple of 8.

    plane: b * nheads + h, of each row (ROWS).
    """
    zero = tl.zeros((ROWS, KEYS // 8), tl.int32)
    c0 = (zero + n // 8 + tl.arange(0, KEYS // 8)[None, :]).to(tl.uint32)
    c1 = (zero + i[:, None]).to(tl.uint32)
    c2 = (zero + plane[:, None]).to(tl.uint32)
    c3 = zero.to(tl.uint32) + last
    w0, w1, w2, w3 = philox(c0, c1, c2, c3, zero.to(tl.uint32) + k0, zero.to(tl.uint32) + k1)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [.., x, y]: word 2 x + y
    bits = tl.join(words & 0xFFFF, words >> 16)
    return tl.reshape(bits, (ROWS, KEYS)) >= threshold.to(tl.uint32)


@triton.jit
def kept_one(i, n, plane, k0, k1, last, threshold, ROWS: tl.constexpr):
    """(ROWS, 1) bool: the same for the one key n."""
    eight = kept(i, n // 8 * 8, plane, k0, k1, last, threshold, ROWS, 8)
    mine = tl.arange(0, 8)[None, :] == n % 8
    return tl.max((eight & mine).to(tl.int32), 1)[:, None] > 0
