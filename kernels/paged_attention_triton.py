"""kernels/paged_attention.py on CUDA, in Triton: tiles of (token, query head) pairs that share a key/value head.

Rows of one token and rows of several take different kernels, so which way a row goes depends on that row alone. A row
of one token is bound by memory: pieces of its keys, which begin at multiples of PIECE, have a program each, and a
second kernel joins them from left to right; one program that takes all pieces of a row, where those of all rows would
need too much memory, sums in the same order. A row of several tokens is bound by arithmetic: a tile of pairs has one
program that goes through all keys. Nothing here waits for the device: which row a tile belongs to is computed there.
Imported only where it runs, because importing Triton takes a while.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from inferfleet.kernels.paged_attention_sums import NOTHING, first_key, join, store, sum_keys
from inferfleet.kernels.tiles_triton import find_tile, padded

PIECE = 512
#: Pairs of a tile in the kernel for one token, and the smallest that a matrix product takes.
PAIRS = 16
#: Bytes that pieces may wait in to be joined.
MAX_APART = 256 << 20
#: Scores are kept in powers of two, which the device raises without a product.
LOG2_E = math.log2(math.e)
#: Numbers that change from step to step: no kernel is compiled again because one of them is 1, or a multiple of 16.
_SIZES = ("rows", "max_blocks", "pieces")


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    seq_lens: Tensor,
    *,
    scale: float,
    window: int | None = None,
    chunk: int | None = None,
    max_query_len: int | None = None,
    max_apart: int = MAX_APART,
) -> Tensor:
    """See kernels/paged_attention.py. Without max_query_len both kernels run, and each finds the rows it is for."""
    if q.stride(2) != 1:
        q = q.contiguous()
    out = q.new_empty(q.shape)
    if out.numel() == 0:
        return out
    batch = (q, k_cache, v_cache, block_tables.to(torch.int32).contiguous(), query_start, seq_lens)
    sight = {"WINDOW": window or 0, "CHUNK": chunk or 0}
    _attend_singles(out, *batch, scale, sight, max_apart)
    if max_query_len != 1:
        _attend_prompts(out, *batch, scale, sight)
    return out


def write_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """See kernels/paged_attention.py; unlike an indexed copy it does not wait to learn how many slots are skipped."""
    tokens, heads, width = k.shape
    if not tokens:
        return
    k, v = (x if x.stride(2) == 1 and x.stride(1) == width else x.contiguous() for x in (k, v))
    size = heads * width
    _scatter[(tokens,)](
        k, v, k_cache, v_cache, slot_mapping, k.stride(0), v.stride(0), SIZE=size, WIDE=triton.next_power_of_2(size)
    )


def _attend_singles(
    out: Tensor,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    tables: Tensor,
    query_start: Tensor,
    seq_lens: Tensor,
    scale: float,
    sight: dict[str, int],
    max_apart: int,
) -> None:
    _, heads, width = q.shape
    rows, kv_heads, block_size = seq_lens.shape[0], k_cache.shape[2], k_cache.shape[1]
    group, wide = heads // kv_heads, _padded(width)
    tiles, pieces = triton.cdiv(group, PAIRS), triton.cdiv(tables.shape[1] * block_size, PIECE)
    waiting = rows * kv_heads * tiles * pieces * PAIRS
    apart = pieces > 1 and waiting * (wide + 2) * 4 <= max_apart
    sums, maxima, totals = (q.new_empty(waiting * size if apart else 0, dtype=torch.float32) for size in (wide, 1, 1))
    shape = {"GROUP": group, "WIDTH": width, "WIDE": wide, "PAIRS": PAIRS, "PIECE": PIECE, **sight}
    keys = _keys(wide, q.element_size())
    _singles[(rows, kv_heads * tiles, pieces if apart else 1)](
        *(out, q, k_cache, v_cache, tables, query_start, seq_lens, sums, maxima, totals),
        *(heads, tables.shape[1], q.stride(0), q.stride(1), scale * LOG2_E),
        APART=apart, BLOCK=block_size, TILES=tiles, KEYS=keys, **shape,
        num_warps=4, num_stages=_stages(wide, keys, q.element_size()),
    )  # fmt: skip
    if apart:
        _join_pieces[(rows, kv_heads * tiles)](
            out, query_start, seq_lens, sums, maxima, totals, heads, pieces, TILES=tiles, **shape, num_warps=4
        )


def _attend_prompts(
    out: Tensor,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    tables: Tensor,
    query_start: Tensor,
    seq_lens: Tensor,
    scale: float,
    sight: dict[str, int],
) -> None:
    tokens, heads, width = q.shape
    if tokens < 2:
        return
    kv_heads, group, wide = k_cache.shape[2], heads // k_cache.shape[2], _padded(width)
    pairs, keys, warps = _tile(wide, q.element_size())
    rows = seq_lens.shape[0]
    # As many tiles as the worst split of so many tokens into rows needs.
    tiles = triton.cdiv(tokens * group, pairs) + min(rows, tokens // 2)
    _prompts[(tiles, kv_heads)](
        *(out, q, k_cache, v_cache, tables, query_start, seq_lens),
        *(rows, heads, kv_heads, tables.shape[1], q.stride(0), q.stride(1), scale * LOG2_E),
        GROUP=group, BLOCK=k_cache.shape[1], WIDTH=width, WIDE=wide, PAIRS=pairs, KEYS=keys, **sight,
        ROWS=padded(rows), num_warps=warps, num_stages=_stages(wide, keys, q.element_size()),
    )  # fmt: skip


def _padded(size: int) -> int:
    """What a matrix product of Triton takes: a power of two, at least 16."""
    return max(16, triton.next_power_of_2(size))


def _keys(wide: int, element_size: int) -> int:
    """Keys of a tile: 16 KB of them, between 16 and 64 keys."""
    return min(64, max(16, (16 << 10) // (wide * element_size)))


def _stages(wide: int, keys: int, element_size: int) -> int:
    """Tiles of keys and values on their way at once: what 128 KB of shared memory hold, at most three."""
    return max(1, min(3, (128 << 10) // (2 * keys * wide * element_size)))


def _tile(wide: int, element_size: int) -> tuple[int, int, int]:
    """(pairs, keys, warps) of the kernel for several tokens: as wide a head, as fewer pairs stay in registers."""
    if element_size == 4:  # no matrix units for exact float32: the whole tile is multiplied in registers
        return 16, min(32, _keys(wide, element_size)), 4
    return (64 if wide >= 256 else 128), _keys(wide, element_size), (4 if wide <= 64 else 8)


@triton.jit(do_not_specialize=_SIZES)
def _singles(
    out: tl.tensor,
    q: tl.tensor,
    k_cache: tl.tensor,
    v_cache: tl.tensor,
    tables: tl.tensor,
    query_start: tl.tensor,
    seq_lens: tl.tensor,
    sums: tl.tensor,
    maxima: tl.tensor,
    totals: tl.tensor,
    heads: tl.tensor,
    max_blocks: tl.tensor,
    q_stride: tl.tensor,
    head_stride: tl.tensor,
    scale: tl.tensor,
    APART: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
    KEYS: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDE: tl.constexpr,
    PAIRS: tl.constexpr,
    PIECE: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    row, kv_head = tl.program_id(0).to(tl.int64), tl.program_id(1) // TILES
    begin, end = tl.load(query_start + row), tl.load(query_start + row + 1)
    if end - begin != 1:
        return
    last = tl.load(seq_lens + row)
    low = first_key(last - 1, WINDOW, CHUNK)
    first_piece = tl.program_id(2) * PIECE
    if APART and (first_piece >= last or first_piece + PIECE <= low):
        return
    pair, wide = (tl.program_id(1) % TILES) * PAIRS + tl.arange(0, PAIRS), tl.arange(0, WIDE)
    inside = (pair < GROUP)[:, None] & (wide < WIDTH)[None, :]
    head = kv_head * GROUP + pair
    query = tl.load(q + begin.to(tl.int64) * q_stride + head[:, None] * head_stride + wide[None, :], inside, other=0.0)
    position = tl.where(pair < GROUP, last - 1, -1)
    table = tables + row * max_blocks
    if APART:
        sum_, maximum, total = sum_keys(
            query, k_cache, v_cache, table, position, last - 1, tl.maximum(low, first_piece),
            tl.minimum(first_piece + PIECE, last), first_piece, kv_head, heads // GROUP, scale,
            BLOCK, WIDTH, WIDE, PAIRS, KEYS, WINDOW, CHUNK,
        )  # fmt: skip
        slot = ((row * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(2) + tl.program_id(2)) * PAIRS
        slot += tl.arange(0, PAIRS)
        tl.store(sums + slot[:, None] * WIDE + wide[None, :], sum_)
        tl.store(maxima + slot, maximum)
        tl.store(totals + slot, total)
    else:
        sum_, total = _sum_pieces(
            query, k_cache, v_cache, table, position, low, last, kv_head, heads // GROUP, scale,
            BLOCK, WIDTH, WIDE, PAIRS, KEYS, PIECE, WINDOW, CHUNK,
        )  # fmt: skip
        store(out, sum_, total, begin.to(tl.int64) * heads + head, inside, WIDTH, WIDE)


@triton.jit
def _sum_pieces(
    query: tl.tensor,
    k_cache: tl.tensor,
    v_cache: tl.tensor,
    table: tl.tensor,
    position: tl.tensor,
    low: tl.tensor,
    last: tl.tensor,
    kv_head: tl.tensor,
    kv_heads: tl.tensor,
    scale: tl.tensor,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDE: tl.constexpr,
    PAIRS: tl.constexpr,
    KEYS: tl.constexpr,
    PIECE: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
) -> tuple:
    """All pieces of a row, joined as `_join_pieces` joins them: (sums, totals)."""
    all_sum = tl.zeros((PAIRS, WIDE), dtype=tl.float32)
    all_maximum = tl.full((PAIRS,), NOTHING, dtype=tl.float32)
    all_total = tl.zeros((PAIRS,), dtype=tl.float32)
    for first in range(low // PIECE * PIECE, last, PIECE):
        sum_, maximum, total = sum_keys(
            query, k_cache, v_cache, table, position, last - 1, tl.maximum(low, first),
            tl.minimum(first + PIECE, last), first, kv_head, kv_heads, scale,
            BLOCK, WIDTH, WIDE, PAIRS, KEYS, WINDOW, CHUNK,
        )  # fmt: skip
        all_sum, all_maximum, all_total = join(all_sum, all_maximum, all_total, sum_, maximum, total, PAIRS, WIDE)
    return all_sum, all_total


@triton.jit(do_not_specialize=_SIZES)
def _join_pieces(
    out: tl.tensor,
    query_start: tl.tensor,
    seq_lens: tl.tensor,
    sums: tl.tensor,
    maxima: tl.tensor,
    totals: tl.tensor,
    heads: tl.tensor,
    pieces: tl.tensor,
    TILES: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDE: tl.constexpr,
    PAIRS: tl.constexpr,
    PIECE: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    row, kv_head = tl.program_id(0).to(tl.int64), tl.program_id(1) // TILES
    begin, end = tl.load(query_start + row), tl.load(query_start + row + 1)
    if end - begin != 1:
        return
    last = tl.load(seq_lens + row)
    low_piece = first_key(last - 1, WINDOW, CHUNK) // PIECE
    pair, wide = (tl.program_id(1) % TILES) * PAIRS + tl.arange(0, PAIRS), tl.arange(0, WIDE)
    all_sum = tl.zeros((PAIRS, WIDE), dtype=tl.float32)
    all_maximum = tl.full((PAIRS,), NOTHING, dtype=tl.float32)
    all_total = tl.zeros((PAIRS,), dtype=tl.float32)
    slot = ((row * tl.num_programs(1) + tl.program_id(1)) * pieces + low_piece) * PAIRS + tl.arange(0, PAIRS)
    for _ in range(low_piece * PIECE, last, PIECE):
        sum_ = tl.load(sums + slot[:, None] * WIDE + wide[None, :])
        maximum, total = tl.load(maxima + slot), tl.load(totals + slot)
        all_sum, all_maximum, all_total = join(all_sum, all_maximum, all_total, sum_, maximum, total, PAIRS, WIDE)
        slot += PAIRS
    place = begin.to(tl.int64) * heads + kv_head * GROUP + pair
    store(out, all_sum, all_total, place, (pair < GROUP)[:, None] & (wide < WIDTH)[None, :], WIDTH, WIDE)


@triton.jit(do_not_specialize=_SIZES)
def _prompts(
    out: tl.tensor,
    q: tl.tensor,
    k_cache: tl.tensor,
    v_cache: tl.tensor,
    tables: tl.tensor,
    query_start: tl.tensor,
    seq_lens: tl.tensor,
    rows: tl.tensor,
    heads: tl.tensor,
    kv_heads: tl.tensor,
    max_blocks: tl.tensor,
    q_stride: tl.tensor,
    head_stride: tl.tensor,
    scale: tl.tensor,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDE: tl.constexpr,
    PAIRS: tl.constexpr,
    KEYS: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    # The last tiles of a prompt see the most keys: they begin first.
    # Rows of one token are the other kernel's.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    row, first_pair = find_tile(query_start, tile, rows, GROUP, PAIRS, 2, ROWS)
    if row >= rows:
        return
    row = row.to(tl.int64)
    begin, end = tl.load(query_start + row), tl.load(query_start + row + 1)
    pair, wide = first_pair + tl.arange(0, PAIRS), tl.arange(0, WIDE)
    token, head = pair // GROUP, tl.program_id(1) * GROUP + pair % GROUP
    is_pair = token < end - begin
    before = tl.load(seq_lens + row) - (end - begin)
    position, first = tl.where(is_pair, before + token, -1), before + first_pair // GROUP
    inside = is_pair[:, None] & (wide < WIDTH)[None, :]
    place = (begin + token).to(tl.int64)
    query = tl.load(q + (place * q_stride + head * head_stride)[:, None] + wide[None, :], inside, other=0.0)
    low = first_key(first, WINDOW, CHUNK)
    sum_, _, total = sum_keys(
        query, k_cache, v_cache, tables + row * max_blocks, position, first, low, tl.max(position, axis=0) + 1,
        low // KEYS * KEYS, tl.program_id(1), kv_heads, scale,
        BLOCK, WIDTH, WIDE, PAIRS, KEYS, WINDOW, CHUNK,
    )  # fmt: skip
    store(out, sum_, total, place * heads + head, inside, WIDTH, WIDE)


@triton.jit
def _scatter(
    k: tl.tensor,
    v: tl.tensor,
    k_cache: tl.tensor,
    v_cache: tl.tensor,
    slots: tl.tensor,
    k_stride: tl.tensor,
    v_stride: tl.tensor,
    SIZE: tl.constexpr,
    WIDE: tl.constexpr,
) -> None:
    token, number = tl.program_id(0).to(tl.int64), tl.arange(0, WIDE)
    slot = tl.load(slots + token)
    mask = (number < SIZE) & (slot >= 0)
    keys = tl.load(k + token * k_stride + number, mask=mask)
    values = tl.load(v + token * v_stride + number, mask=mask)
    tl.store(k_cache + slot * SIZE + number, keys.to(k_cache.dtype.element_ty), mask=mask)
    tl.store(v_cache + slot * SIZE + number, values.to(v_cache.dtype.element_ty), mask=mask)
