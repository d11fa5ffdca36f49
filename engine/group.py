"""The ranks that hold one model together: what each has of it, and how their results become one.

A matrix product is split by its outputs (each rank computes some heads, or some of an MLP's width) and the product
that follows it by its inputs; the sum over the ranks is then what one rank alone would have computed. Knows no layer
and no process: engine/ranks.py joins processes, a lone group joins nothing and costs nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from inferfleet.engine.errors import LoadError
from inferfleet.engine.share import Share

#: Numbers that lie together in a comb, at most.
TOOTH = 16


class Group:
    """Rank `rank` of `size`; this class itself is a model that is whole."""

    rank = 0
    size = 1

    def sum(self, x: Tensor) -> Tensor:
        """The sum of what all ranks bring, the same on each; in the order of the ranks, whatever else is in x."""
        return x

    def gather(self, x: Tensor, whole: int) -> Tensor:
        """x [N, this rank's width of `whole`] of all ranks side by side -> [N, whole]."""
        return x

    def share_of_memory(self, free: int, device: torch.device) -> int:
        """Of so many free bytes on this rank's device, those that each rank may count on."""
        return free

    def share(self, units: int, field: str) -> Share:
        """An equal number of units (heads) for every rank. LoadError names the field where they do not come out."""
        if units % self.size:
            raise _unfit(self.size, f"{field} is {units}", [n for n in range(1, units + 1) if units % n == 0])
        return Share(units, (stretch(units, self.rank, self.size),))

    def width(self, width: int, field: str) -> Share:
        """About as much of a width as every other rank has: for dimensions without heads."""
        if width < self.size:
            raise _unfit(self.size, f"{field} is {width}", [*range(1, width + 1)])
        return Share(width, (stretch(width, self.rank, self.size),))

    def comb(self, width: int, field: str) -> Share:
        """Teeth all over a width of which a caller may use only the beginning: every rank has a part of any."""
        if self.size == 1 or width < self.size:
            return self.width(width, field)
        tooth = max(1, min(TOOTH, width // (TOOTH * self.size)))
        teeth = range(self.rank * tooth, width, self.size * tooth)
        return Share(width, tuple((begin, min(begin + tooth, width)) for begin in teeth))

    def heads(self, num_heads: int, num_kv_heads: int) -> tuple[Share, Share]:
        """Query heads, and the key/value heads that those read: whole groups of them, or one that ranks share."""

        def fits(size: int) -> bool:
            return num_heads % size == 0 and (num_kv_heads % size == 0 or size % num_kv_heads == 0)

        if not fits(self.size):
            sizes = [size for size in range(1, num_heads + 1) if fits(size)]
            named = f"num_attention_heads is {num_heads} and num_key_value_heads is {num_kv_heads}"
            raise _unfit(self.size, named, sizes)
        begin, end = stretch(num_heads, self.rank, self.size)
        per_kv = num_heads // num_kv_heads
        return Share(num_heads, ((begin, end),)), Share(num_kv_heads, ((begin // per_kv, (end - 1) // per_kv + 1),))

    def kv_heads(self, num_kv_heads: int) -> int:
        """How many key/value heads of a layer lie in this rank's cache."""
        return max(1, num_kv_heads // self.size)


def stretch(count: int, rank: int, size: int) -> tuple[int, int]:
    """(begin, end) of a rank's part of `count`; parts differ by one at most."""
    return count * rank // size, count * (rank + 1) // size


def _unfit(size: int, why: str, sizes: list[int]) -> LoadError:
    return LoadError(
        f"this model cannot be split over tensor_parallel_size {size}, because its {why};"
        f" that works with {', '.join(map(str, sizes))}",
        param="tensor_parallel_size",
    )


#: The group of a model that one process holds.
ALONE = Group()
