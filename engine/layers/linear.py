"""Matrix products of a model: one per place, holding the projections that share an input one under another."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from inferfleet.engine.layers.matrix import Matrix, Product
from inferfleet.engine.layers.slots import Slot, Slots, Storage, Weighted
from inferfleet.engine.place import Place
from inferfleet.engine.share import Dim, held, is_split, whole


class Linear(Weighted):
    """y = x @ W.T (+ b), where W stacks named projections, e.g. {"q_proj": 2048, "k_proj": 512, "v_proj": 512}.

    One product instead of three reads x once and gives the matrix kernel a larger problem. Its weight is quantised
    where its place says so: what must stay as it is takes `place.exact`.

    A part whose size is a share has that share of the outputs. Where in_features is split, x is the part that this
    rank computed, and y the sum over the ranks.
    """

    def __init__(
        self,
        in_features: Dim,
        parts: Mapping[str, Dim],
        *,
        bias: bool = False,
        place: Place,
    ) -> None:
        super().__init__()
        self.sizes = tuple(map(held, parts.values()))
        self._in_features, self._parts, self._has_bias = in_features, dict(parts), bias
        self._weight = Matrix(sum(self.sizes), in_features, place=place)
        self._group = place.group if is_split(in_features) else None
        # One rank adds the bias of a sum.
        adds = bias and (self._group is None or self._group.rank == 0)
        self._bias = Storage(sum(self.sizes), place=place) if adds else None
        self._product: Product | None = None

    def slots(self, name: str) -> Slots:
        found: dict[str, Slot] = {}
        begin = 0
        for part, size in self._parts.items():
            rows = slice(begin, begin + held(size))
            found[f"{part}.weight"] = self._weight.slot(rows, dims=(size, self._in_features))
            if self._bias is not None:
                found[f"{part}.bias"] = self._bias.slot(rows, dims=(size,))
            elif self._has_bias:
                found[f"{part}.bias"] = Slot.unused(whole(size))
            begin = rows.stop
        return Slots(found)

    def finalize(self) -> None:
        # The packed copy is the only one from here on.
        self._product = self._weight.product(None if self._bias is None else self._bias.take())

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., sum of the parts]."""
        assert self._product is not None, "finalize comes before the first product"
        y = self._product(x)
        return y if self._group is None else self._group.sum(y)
