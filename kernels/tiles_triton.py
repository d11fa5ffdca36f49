"""Which piece of a ragged batch a program works on, found on the device: no operation before the kernel, no waiting."""

from __future__ import annotations

import triton
import triton.language as tl


def padded(count: int) -> int:
    """What `find_tile` takes as ROWS: few different sizes, because each is compiled for."""
    return max(64, triton.next_power_of_2(count))


@triton.jit
def find_tile(
    starts: tl.tensor,
    tile: tl.tensor,
    rows: tl.tensor,
    each: tl.tensor,
    SIZE: tl.constexpr,
    LEAST: tl.constexpr,
    ROWS: tl.constexpr,
) -> tuple:
    """(row, number of its first thing) of a tile of SIZE things; a tile too many has the number of rows, or more.

    Row r has `each` things for each of its starts[r + 1] - starts[r] members, and no tile with fewer than LEAST.
    """
    number = tl.arange(0, ROWS)
    begins = tl.load(starts + number, mask=number < rows, other=0)
    lengths = tl.load(starts + number + 1, mask=number < rows, other=0) - begins
    tiles = tl.where(lengths >= LEAST, (lengths * each + SIZE - 1) // SIZE, 0)
    ends = tl.cumsum(tiles, axis=0)
    row = tl.sum((ends <= tile).to(tl.int32), axis=0)
    before = tl.sum(tl.where(number < row, tiles, 0), axis=0)
    return row, (tile - before) * SIZE
