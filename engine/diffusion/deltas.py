"""What adapters add to one matrix product, picture by picture.

    y[b] += scale * (alpha / r) * (x[b] @ A.T) @ B.T        for each adapter that picture b chose

(Hu et al. 2021, LoRA.) A picture that chose none costs nothing, and each picture is computed by itself, so that its
numbers do not depend on what the others chose. The base weight is never touched: it may be coded, and several
adapters may be resident.

B batch · T tokens · K inputs · R rank of an adapter's parts together · r rank of one part
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch.nn.functional as F
from torch import Tensor

#: One picture's choice: (adapter, scale) in the order in which they are added.
Row = tuple[tuple[str, float], ...]


@dataclass
class Selection:
    """What the pictures of the next transformer call chose; one object for all products of a transformer."""

    #: One a picture; empty = nobody chose anything, whatever the batch.
    rows: Sequence[Row] = ()


@dataclass(frozen=True)
class Up:
    """B of one part of a product."""

    #: Outputs of the product that are this part's, and rows of the stacked A that feed it.
    outputs: slice
    ranks: slice
    #: [outputs, r]
    weight: Tensor
    #: alpha / r, or what else the adapter's file says.
    factor: float


@dataclass(frozen=True)
class Delta:
    """One adapter's change of one product."""

    #: A of its parts one under another, [R, K]: x is read once.
    down: Tensor
    ups: tuple[Up, ...]

    @property
    def nbytes(self) -> int:
        return self.down.nbytes + sum(up.weight.nbytes for up in self.ups)

    def add_to(self, y: Tensor, x: Tensor, scale: float) -> None:
        """x [1, T, K] or [1, K], y [1, (T,) N]."""
        inner = F.linear(x, self.down)
        for up in self.ups:
            y[..., up.outputs] += F.linear(inner[..., up.ranks] * (scale * up.factor), up.weight)


@dataclass
class Deltas:
    """Every adapter's change of one product."""

    selection: Selection
    of: dict[str, Delta] = field(default_factory=dict)

    def add_to(self, y: Tensor, x: Tensor) -> None:
        """y [B, (T,) N] gets what each row of x [B, (T,) K] chose."""
        rows = self.selection.rows
        if not rows:
            return
        if len(rows) != len(x):
            raise ValueError(f"adapters were selected for {len(rows)} pictures, and {len(x)} are computed")
        for index, row in enumerate(rows):
            one = slice(index, index + 1)
            for name, scale in row:
                if name in self.of:
                    self.of[name].add_to(y[one], x[one], scale)
