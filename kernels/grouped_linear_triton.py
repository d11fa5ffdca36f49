"""kernels/grouped_linear.py on CUDA: one Triton kernel over tiles of rows, none of which spans two groups.

Which group a tile belongs to is computed on the device, so the grid is as large as the worst routing would need and a
tile without rows ends at once. Tiles always have the same size, whatever the number of rows: then a row's sums are the
same alone and among others. Imported only where it runs, because importing Triton takes a while.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from inferfleet.kernels.tiles_triton import find_tile, padded

ROWS, COLUMNS = 64, 64
#: Bytes of a row that are loaded together; exact float32 has no matrix units and keeps what it multiplies in registers.
DEPTH_BYTES = {2: 256, 4: 128}


def grouped_linear(x: Tensor, offsets: Tensor, weight: Tensor) -> Tensor:
    """x [N, K], offsets [G+1] int32, weight [G, M, K] -> [N, M]; summed in float32, never in TF32."""
    x, weight = x if x.stride(1) == 1 else x.contiguous(), weight.contiguous()
    rows, (groups, columns, depth) = x.shape[0], weight.shape
    out = x.new_empty(rows, columns)
    if out.numel() == 0:
        return out
    # As many tiles as the worst routing needs.
    grid = (triton.cdiv(rows, ROWS) + min(groups, rows), triton.cdiv(columns, COLUMNS))
    _product[grid](
        *(out, x, weight, offsets, groups, columns, depth, x.stride(0)),
        ROWS=ROWS, COLUMNS=COLUMNS, DEPTH=DEPTH_BYTES[x.element_size()] // x.element_size(), GROUPS=padded(groups),
    )  # fmt: skip
    return out


@triton.jit
def _product(
    out: tl.tensor,
    x: tl.tensor,
    weight: tl.tensor,
    offsets: tl.tensor,
    groups: tl.tensor,
    columns: tl.tensor,
    depth: tl.tensor,
    x_stride: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUPS: tl.constexpr,
) -> None:
    group, first = find_tile(offsets, tl.program_id(0), groups, 1, ROWS, 1, GROUPS)
    if group >= groups:
        return
    # In 64 bits: a stack of experts has more numbers than 32 count.
    row = (tl.load(offsets + group) + first + tl.arange(0, ROWS)).to(tl.int64)
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
