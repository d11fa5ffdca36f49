"""kernels/latent_attention.py on CUDA, in Triton: tiles of (token, head) pairs of one row against its latents.

A tile's keys are summed in pieces that begin at multiples of PIECE, and pieces are joined from left to right. So a
(token, head) has one order of sums: alone or in a batch, in a prompt or a decoding step, and whether one program takes
all pieces of a tile or, where there are few tiles, each piece has a program of its own and a second kernel joins them.
Nothing here waits for the device: which row a tile belongs to is computed there. Imported only where it runs, because
importing Triton takes a while.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from inferfleet.kernels.tiles_triton import find_tile, padded

ROWS, KEYS, PIECE = 16, 32, 1024
#: Compiled for sm_90 at R = 512, eight hold a tile of bfloat16 sums in registers and four do not. A tile of float32
#: latents takes 110 KB of shared memory: too much to have the next one on its way, which is why it gets one stage.
WARPS = 8
#: Bytes that pieces may wait in to be joined.
MAX_APART = 256 << 20
#: A maximum over no keys; finite, so that differences of two stay defined.
NOTHING = tl.constexpr(-3.0e38)
#: Numbers that change from step to step: no kernel is compiled again because one of them is 1, or a multiple of 16.
_SIZES = ("rows", "max_blocks", "pieces")


def latent_attention(
    q: Tensor,
    cache: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    seq_lens: Tensor,
    *,
    rank: int,
    scale: float,
    apart: bool | None = None,
) -> Tensor:
    """See kernels/latent_attention.py. apart: give each piece a program of its own; by default where tiles are few."""
    tokens, heads, width = q.shape
    out = q.new_empty(tokens, heads, rank)
    if out.numel() == 0:
        return out
    q, tables = q.contiguous(), block_tables.to(torch.int32).contiguous()
    rows = seq_lens.shape[0]
    # As many tiles as the worst split of so many tokens into rows needs.
    tiles = triton.cdiv(tokens * heads, ROWS) + min(rows, tokens)
    pieces = triton.cdiv(tables.shape[1] * cache.shape[1], PIECE)
    wide = _padded(rank)
    if apart is None:
        apart = pieces > 1 and tiles < _programs(q.device) and tiles * pieces * ROWS * (wide + 2) * 4 <= MAX_APART
    waiting = tiles * pieces * ROWS if apart else 0
    sums, maxima, totals = (q.new_empty(waiting * size, dtype=torch.float32) for size in (wide, 1, 1))
    batch = (query_start, seq_lens, rows, heads)
    blocks = (cache.shape[1], tables.shape[1], pieces)
    _attend[(tiles, pieces if apart else 1)](
        *(out, q, cache, tables, sums, maxima, totals, *batch, width, rank, *blocks, scale),
        APART=apart,
        SIZES=padded(rows),
        ROWS=ROWS,
        KEYS=KEYS,
        PIECE=PIECE,
        WIDE=wide,
        NARROW=_padded(width - rank),
        num_warps=WARPS,
        num_stages=2 if q.element_size() == 2 else 1,
    )
    if apart:
        _join_pieces[(tiles,)](
            *(out, sums, maxima, totals, *batch, rank, pieces),
            SIZES=padded(rows), ROWS=ROWS, PIECE=PIECE, WIDE=wide,
        )  # fmt: skip
    return out


def write_latent(latent: Tensor, cache: Tensor, slot_mapping: Tensor) -> None:
    """See kernels/latent_attention.py; unlike an indexed copy it does not wait to learn how many slots are skipped."""
    if latent.stride(1) != 1:
        latent = latent.contiguous()
    tokens, width = latent.shape
    if tokens:
        _scatter[(tokens,)](latent, cache, slot_mapping, latent.stride(0), width, WIDE=triton.next_power_of_2(width))


def _padded(size: int) -> int:
    """What a matrix product of Triton takes: a power of two, at least 16."""
    return max(16, triton.next_power_of_2(size))


def _programs(device: torch.device) -> int:
    """Programs that keep the device busy."""
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit(do_not_specialize=_SIZES)
def _attend(
    out: tl.tensor,
    q: tl.tensor,
    cache: tl.tensor,
    tables: tl.tensor,
    sums: tl.tensor,
    maxima: tl.tensor,
    totals: tl.tensor,
    query_start: tl.tensor,
    seq_lens: tl.tensor,
    rows: tl.tensor,
    heads: tl.tensor,
    width: tl.tensor,
    rank: tl.tensor,
    block_size: tl.tensor,
    max_blocks: tl.tensor,
    pieces: tl.tensor,
    scale: tl.tensor,
    APART: tl.constexpr,
    SIZES: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    PIECE: tl.constexpr,
    WIDE: tl.constexpr,
    NARROW: tl.constexpr,
) -> None:
    row, place, position, last = _pairs(query_start, seq_lens, rows, heads, SIZES, ROWS)
    is_pair = position >= 0
    wide, narrow = tl.arange(0, WIDE), tl.arange(0, NARROW)
    query = q + place[:, None] * width
    q_wide = tl.load(query + wide[None, :], mask=is_pair[:, None] & (wide < rank)[None, :], other=0.0)
    in_narrow = is_pair[:, None] & (narrow < width - rank)[None, :]
    q_narrow = tl.load(query + rank + narrow[None, :], mask=in_narrow, other=0.0)
    table = tables + row * max_blocks
    if APART:
        begin = tl.program_id(1) * PIECE
        sum_, maximum, total = _sum_piece(
            cache, table, q_wide, q_narrow, position, begin, tl.minimum(begin + PIECE, last),
            width, rank, block_size, scale, ROWS, KEYS, WIDE, NARROW,
        )  # fmt: skip
        slot = (tl.program_id(0).to(tl.int64) * pieces + tl.program_id(1)) * ROWS + tl.arange(0, ROWS)
        tl.store(sums + slot[:, None] * WIDE + wide[None, :], sum_)
        tl.store(maxima + slot, maximum)
        tl.store(totals + slot, total)
    else:
        all_sum = tl.zeros((ROWS, WIDE), dtype=tl.float32)
        all_maximum = tl.full((ROWS,), NOTHING, dtype=tl.float32)
        all_total = tl.zeros((ROWS,), dtype=tl.float32)
        for begin in range(0, last, PIECE):
            sum_, maximum, total = _sum_piece(
                cache, table, q_wide, q_narrow, position, begin, tl.minimum(begin + PIECE, last),
                width, rank, block_size, scale, ROWS, KEYS, WIDE, NARROW,
            )  # fmt: skip
            all_sum, all_maximum, all_total = _join(all_sum, all_maximum, all_total, sum_, maximum, total, ROWS, WIDE)
        _store(out, all_sum, all_total, place, is_pair, rank, WIDE)


@triton.jit(do_not_specialize=_SIZES)
def _join_pieces(
    out: tl.tensor,
    sums: tl.tensor,
    maxima: tl.tensor,
    totals: tl.tensor,
    query_start: tl.tensor,
    seq_lens: tl.tensor,
    rows: tl.tensor,
    heads: tl.tensor,
    rank: tl.tensor,
    pieces: tl.tensor,
    SIZES: tl.constexpr,
    ROWS: tl.constexpr,
    PIECE: tl.constexpr,
    WIDE: tl.constexpr,
) -> None:
    _, place, position, last = _pairs(query_start, seq_lens, rows, heads, SIZES, ROWS)
    all_sum = tl.zeros((ROWS, WIDE), dtype=tl.float32)
    all_maximum = tl.full((ROWS,), NOTHING, dtype=tl.float32)
    all_total = tl.zeros((ROWS,), dtype=tl.float32)
    slot = tl.program_id(0).to(tl.int64) * pieces * ROWS + tl.arange(0, ROWS)
    for _ in range(0, last, PIECE):
        sum_ = tl.load(sums + slot[:, None] * WIDE + tl.arange(0, WIDE)[None, :])
        maximum, total = tl.load(maxima + slot), tl.load(totals + slot)
        all_sum, all_maximum, all_total = _join(all_sum, all_maximum, all_total, sum_, maximum, total, ROWS, WIDE)
        slot += ROWS
    _store(out, all_sum, all_total, place, position >= 0, rank, WIDE)


@triton.jit
def _pairs(
    query_start: tl.tensor,
    seq_lens: tl.tensor,
    rows: tl.tensor,
    heads: tl.tensor,
    SIZES: tl.constexpr,
    ROWS: tl.constexpr,
) -> tuple:
    """Of this program's tile: its row, its pairs' places in q and out, their positions (-1: none), the last key."""
    wanted, first = find_tile(query_start, tl.program_id(0), rows, heads, ROWS, 1, SIZES)
    row = tl.minimum(wanted, rows - 1)
    begin, end = tl.load(query_start + row), tl.load(query_start + row + 1)
    pair = first + tl.arange(0, ROWS)
    token = pair // heads
    is_pair = (token < end - begin) & (wanted < rows)
    position = tl.where(is_pair, tl.load(seq_lens + row) - (end - begin) + token, -1)
    place = (begin + token).to(tl.int64) * heads + pair % heads
    return row.to(tl.int64), place, position, tl.max(position, axis=0) + 1


@triton.jit
def _sum_piece(
    cache: tl.tensor,
    table: tl.tensor,
    q_wide: tl.tensor,
    q_narrow: tl.tensor,
    position: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    width: tl.tensor,
    rank: tl.tensor,
    block_size: tl.tensor,
    scale: tl.tensor,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    WIDE: tl.constexpr,
    NARROW: tl.constexpr,
) -> tuple:
    """(sums of latents weighted by exp(score - maximum), maximum, total of the weights) over keys begin..end."""
    wide, narrow = tl.arange(0, WIDE), tl.arange(0, NARROW)
    sum_ = tl.zeros((ROWS, WIDE), dtype=tl.float32)
    maximum = tl.full((ROWS,), NOTHING, dtype=tl.float32)
    total = tl.zeros((ROWS,), dtype=tl.float32)
    for first in range(begin, end, KEYS):
        key = first + tl.arange(0, KEYS)
        is_key = key < end
        block = tl.load(table + key // block_size, mask=is_key, other=0).to(tl.int64)
        latent = cache + ((block * block_size + key % block_size) * width)[:, None]
        # Places that no row has written may hold NaN: none is loaded.
        c = tl.load(latent + wide[None, :], mask=is_key[:, None] & (wide < rank)[None, :], other=0.0)
        in_narrow = is_key[:, None] & (narrow < width - rank)[None, :]
        turned = tl.load(latent + rank + narrow[None, :], mask=in_narrow, other=0.0)
        scores = tl.dot(q_wide, tl.trans(c), input_precision="ieee")
        scores = tl.dot(q_narrow, tl.trans(turned), scores, input_precision="ieee") * scale
        is_seen = is_key[None, :] & (key[None, :] <= position[:, None])
        scores = tl.where(is_seen, scores, NOTHING)
        common = tl.maximum(maximum, tl.max(scores, axis=1))
        weights = tl.where(is_seen, tl.exp(scores - common[:, None]), 0.0)
        share = tl.exp(maximum - common)
        total = total * share + tl.sum(weights, axis=1)
        sum_ = tl.dot(weights.to(c.dtype), c, sum_ * share[:, None], input_precision="ieee")
        maximum = common
    return sum_, maximum, total


@triton.jit
def _join(
    left: tl.tensor,
    left_maximum: tl.tensor,
    left_total: tl.tensor,
    right: tl.tensor,
    right_maximum: tl.tensor,
    right_total: tl.tensor,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
) -> tuple:
    """Two sums as one. Written with fma, because both kernels must round in the same places."""
    maximum = tl.maximum(left_maximum, right_maximum)
    left_share, right_share = tl.exp(left_maximum - maximum), tl.exp(right_maximum - maximum)
    sum_ = tl.fma(left, tl.broadcast_to(left_share[:, None], (ROWS, WIDE)), right * right_share[:, None])
    return sum_, maximum, tl.fma(left_total, left_share, right_total * right_share)


@triton.jit
def _store(
    out: tl.tensor,
    sum_: tl.tensor,
    total: tl.tensor,
    place: tl.tensor,
    is_pair: tl.tensor,
    rank: tl.tensor,
    WIDE: tl.constexpr,
) -> None:
    wide = tl.arange(0, WIDE)
    mask = is_pair[:, None] & (wide < rank)[None, :]
    mean = sum_ / tl.where(is_pair, total, 1.0)[:, None]
    tl.store(out + place[:, None] * rank + wide[None, :], mean.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _scatter(
    latent: tl.tensor,
    cache: tl.tensor,
    slots: tl.tensor,
    stride: tl.tensor,
    width: tl.tensor,
    WIDE: tl.constexpr,
) -> None:
    slot, number = tl.load(slots + tl.program_id(0)), tl.arange(0, WIDE)
    mask = number < tl.where(slot < 0, 0, width)
    values = tl.load(latent + tl.program_id(0).to(tl.int64) * stride + number, mask=mask)
    tl.store(cache + slot * width + number, values.to(cache.dtype.element_ty), mask=mask)
