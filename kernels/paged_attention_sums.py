"""What the kernels of paged_attention_triton.py are made of: a tile of (token, query head) pairs meets tiles of keys.

Everything here runs on the device, inside a kernel. Sums are float32, scores powers of two.
"""

from __future__ import annotations

import triton
import triton.language as tl

#: A maximum over no keys; finite, so that differences of two stay defined.
NOTHING = tl.constexpr(-3.0e38)


@triton.jit
def first_key(position: tl.tensor, WINDOW: tl.constexpr, CHUNK: tl.constexpr) -> tl.tensor:
    """The first key that a token at this position sees."""
    low = position * 0
    if WINDOW > 0:
        low = tl.maximum(low, position - WINDOW + 1)
    if CHUNK > 0:
        low = tl.maximum(low, position // CHUNK * CHUNK)
    return low


@triton.jit
def sum_keys(
    query: tl.tensor,
    k_cache: tl.tensor,
    v_cache: tl.tensor,
    table: tl.tensor,
    position: tl.tensor,
    first_position: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    start: tl.tensor,
    kv_head: tl.tensor,
    kv_heads: tl.tensor,
    scale: tl.tensor,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDE: tl.constexpr,
    PAIRS: tl.constexpr,
    KEYS: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
) -> tuple:
    """(sums of values weighted by 2^(score - maximum), maximum, total of the weights) over keys low..high.

    Tiles of keys begin at `start`, which is at most low: where they lie does not depend on what is seen. Those that
    all pairs see, as the one at first_position does, need no mask.
    """
    sum_ = tl.zeros((PAIRS, WIDE), dtype=tl.float32)
    maximum = tl.full((PAIRS,), NOTHING, dtype=tl.float32)
    total = tl.zeros((PAIRS,), dtype=tl.float32)
    begin = start + (low - start) // KEYS * KEYS
    if WINDOW == 0 and CHUNK == 0:
        whole = begin + tl.maximum(tl.minimum(high, first_position + 1) - begin, 0) // KEYS * KEYS
        for first in range(begin, whole, KEYS):
            sum_, maximum, total = add_keys(
                sum_, maximum, total, query, k_cache, v_cache, table, position, first, low, high,
                kv_head, kv_heads, scale, False, BLOCK, WIDTH, WIDE, KEYS, WINDOW, CHUNK,
            )  # fmt: skip
        begin = whole
    for first in range(begin, high, KEYS):
        sum_, maximum, total = add_keys(
            sum_, maximum, total, query, k_cache, v_cache, table, position, first, low, high,
            kv_head, kv_heads, scale, True, BLOCK, WIDTH, WIDE, KEYS, WINDOW, CHUNK,
        )  # fmt: skip
    return sum_, maximum, total


@triton.jit
def add_keys(
    sum_: tl.tensor,
    maximum: tl.tensor,
    total: tl.tensor,
    query: tl.tensor,
    k_cache: tl.tensor,
    v_cache: tl.tensor,
    table: tl.tensor,
    position: tl.tensor,
    first: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    kv_head: tl.tensor,
    kv_heads: tl.tensor,
    scale: tl.tensor,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDE: tl.constexpr,
    KEYS: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
) -> tuple:
    """`sum_keys` goes on by the tile of keys at `first`."""
    key, wide = first + tl.arange(0, KEYS), tl.arange(0, WIDE)
    is_key = (key >= low) & (key < high) if MASKED else key >= 0
    block = tl.load(table + key // BLOCK, mask=is_key, other=0).to(tl.int64)
    place = ((block * BLOCK + key % BLOCK) * kv_heads + kv_head) * WIDTH
    # Places that no row has written may hold NaN: none is loaded.
    inside = is_key[:, None] & (wide < WIDTH)[None, :]
    keys = tl.load(k_cache + place[:, None] + wide[None, :], mask=inside, other=0.0)
    values = tl.load(v_cache + place[:, None] + wide[None, :], mask=inside, other=0.0)
    scores = tl.dot(query, tl.trans(keys), input_precision="ieee") * scale
    if MASKED:
        is_seen = is_key[None, :] & (key[None, :] <= position[:, None])
        if WINDOW > 0:
            is_seen &= key[None, :] > position[:, None] - WINDOW
        if CHUNK > 0:
            is_seen &= key[None, :] >= (position // CHUNK * CHUNK)[:, None]
        scores = tl.where(is_seen, scores, NOTHING)
    common = tl.maximum(maximum, tl.max(scores, axis=1))
    weights = tl.exp2(scores - common[:, None])
    if MASKED:
        weights = tl.where(is_seen, weights, 0.0)
    share = tl.exp2(maximum - common)
    total = total * share + tl.sum(weights, axis=1)
    sum_ = tl.dot(weights.to(values.dtype), values, sum_ * share[:, None], input_precision="ieee")
    return sum_, common, total


@triton.jit
def join(
    left: tl.tensor,
    left_maximum: tl.tensor,
    left_total: tl.tensor,
    right: tl.tensor,
    right_maximum: tl.tensor,
    right_total: tl.tensor,
    PAIRS: tl.constexpr,
    WIDE: tl.constexpr,
) -> tuple:
    """Two sums as one. Written with fma, because both kernels must round in the same places."""
    maximum = tl.maximum(left_maximum, right_maximum)
    left_share, right_share = tl.exp2(left_maximum - maximum), tl.exp2(right_maximum - maximum)
    sum_ = tl.fma(left, tl.broadcast_to(left_share[:, None], (PAIRS, WIDE)), right * right_share[:, None])
    return sum_, maximum, tl.fma(left_total, left_share, right_total * right_share)


@triton.jit
def store(
    out: tl.tensor,
    sum_: tl.tensor,
    total: tl.tensor,
    place: tl.tensor,
    inside: tl.tensor,
    WIDTH: tl.constexpr,
    WIDE: tl.constexpr,
) -> None:
    """Means to out [T, heads, WIDTH] at place, token * heads + head of each pair; one that is none has a total of 0."""
    mean = sum_ / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(out + place[:, None] * WIDTH + tl.arange(0, WIDE)[None, :], mean.to(out.dtype.element_ty), mask=inside)
