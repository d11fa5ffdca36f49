"""Which part of a dimension one rank of a split model holds. Knows no process and no layer.

A layer's constructor takes each of its sizes as a `Dim`: a number is held whole by every rank, a `Share` by parts. The
checkpoint always has the whole; the layer keeps what its share says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Share:
    """Some stretches of a dimension of `whole` numbers, in order."""

    whole: int
    #: (begin, end) of each stretch.
    stretches: tuple[tuple[int, int], ...]

    @property
    def size(self) -> int:
        return sum(end - begin for begin, end in self.stretches)

    @property
    def is_split(self) -> bool:
        """Whether other ranks hold what is missing here."""
        return self.size < self.whole

    def below(self, width: int) -> int:
        """How many of the first `width` numbers of the dimension are here."""
        return sum(max(0, min(end, width) - begin) for begin, end in self.stretches)

    def times(self, width: int) -> Share:
        """The same share where each unit (a head) is `width` numbers."""
        return Share(self.whole * width, tuple((begin * width, end * width) for begin, end in self.stretches))

    def then(self, other: Share) -> Share:
        """This dimension with another one behind it in the same tensor."""
        shifted = tuple((begin + self.whole, end + self.whole) for begin, end in other.stretches)
        return Share(self.whole + other.whole, self.stretches + shifted)

    def of(self, tensor: Tensor, dim: int) -> Tensor:
        """This share of a whole tensor; a view where it is one stretch."""
        parts = [tensor.narrow(dim, begin, end - begin) for begin, end in self.stretches]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


Dim = int | Share


def held(dim: Dim) -> int:
    """How much of the dimension is here."""
    return dim.size if isinstance(dim, Share) else dim


def whole(dim: Dim) -> int:
    """How much of it a checkpoint has."""
    return dim.whole if isinstance(dim, Share) else dim


def is_split(dim: Dim) -> bool:
    return isinstance(dim, Share) and dim.is_split


def cut(tensor: Tensor, dims: Sequence[Dim]) -> Tensor:
    """What is held here of a whole tensor with these dimensions."""
    for number, dim in enumerate(dims):
        if isinstance(dim, Share):
            tensor = dim.of(tensor, number)
    return tensor
