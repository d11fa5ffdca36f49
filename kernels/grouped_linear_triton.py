"""kernels/grouped_linear.py on CUDA: one Triton kernel over tiles of rows, none of which spans two groups.

Which group a tile belongs to is computed on the device, so the grid is as large as the worst routing would need and a
tile without rows ends at once. Tiles always have the same size, whatever the number of rows: then a row's sums are the
same alone and among others. Imported only where it runs, because importing Triton takes a while.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS, DEPTH = 64, 64, 32


def grouped_linear(x: Tensor, offsets: Tensor, weight: Tensor) -> Tensor:
    """x [N, K], offsets [G+1] int32, weight [G, M, K] -> [N, M]; summed in float32, never in TF32."""
    x, weight = x if x.stride(1) == 1 else x.contiguous(), weight.contiguous()
    rows, (groups, columns, depth) = x.shape[0], weight.shape
    out = x.new_empty(rows, columns)
    if out.numel() == 0:
        return out
    tile_group, tile_begin = place_tiles(offsets, rows)
    grid = (tile_group.shape[0], triton.cdiv(columns, COLUMNS))
    _product[grid](
        out, x, weight, offsets, tile_group, tile_begin, groups, columns, depth, x.stride(0), ROWS, COLUMNS, DEPTH
    )
    return out


def place_tiles(offsets: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """(group, first row) of each tile [tiles] int32; the group of a tile without rows is the number of groups."""
    groups = offsets.shape[0] - 1
    tiles = (offsets.diff() + ROWS - 1) // ROWS
    ends = tiles.cumsum(0)
    numbers = torch.arange(triton.cdiv(rows, ROWS) + min(groups, rows), device=offsets.device)
    group = torch.searchsorted(ends, numbers, right=True)
    known = group.clamp(max=groups - 1)
    begin = offsets[known] + (numbers - (ends - tiles)[known]) * ROWS
    return group.to(torch.int32), begin.to(torch.int32)


@triton.jit
def _product(
    out: tl.tensor,
    x: tl.tensor,
    weight: tl.tensor,
    offsets: tl.tensor,
    tile_group: tl.tensor,
    tile_begin: tl.tensor,
    groups: tl.tensor,
    columns: tl.tensor,
    depth: tl.tensor,
    x_stride: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
) -> None:
    group = tl.load(tile_group + tl.program_id(0))
    if group >= groups:
        return
    # In 64 bits: a stack of experts has more numbers than 32 count.
    row = (tl.load(tile_begin + tl.program_id(0)) + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    has_row, has_column = row < tl.load(offsets + group + 1), column < columns
    step = tl.arange(0, DEPTH)
    x_tile = x + row[:, None] * x_stride + step[None, :]
    weight_tile = weight + (group.to(tl.int64) * columns + column[None, :]) * depth + step[:, None]
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for begin in range(0, depth, DEPTH):
        inside = begin + step < depth
        left = tl.load(x_tile + begin, mask=has_row[:, None] & inside[None, :], other=0.0)
        right = tl.load(weight_tile + begin, mask=has_column[None, :] & inside[:, None], other=0.0)
        total = tl.dot(left, right, total, input_precision="ieee")
    place = out + row[:, None] * columns + column[None, :]
    tl.store(place, total.to(out.dtype.element_ty), mask=has_row[:, None] & has_column[None, :])
