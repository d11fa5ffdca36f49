"""Matrix products of a model: one per place, holding the projections that share an input one under another."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from inferfleet.engine.layers.slots import Slot, Slots, Storage, Weighted
from inferfleet.engine.place import Place
from inferfleet.kernels.linear import PackedLinear


class Linear(Weighted):
    """y = x @ W.T (+ b), where W stacks named projections, e.g. {"q_proj": 2048, "k_proj": 512, "v_proj": 512}.

    One product instead of three reads x once and gives the matrix kernel a larger problem.
    """

    def __init__(
        self,
        in_features: int,
        parts: Mapping[str, int],
        *,
        bias: bool = False,
        place: Place,
    ) -> None:
        super().__init__()
        self.sizes = tuple(parts.values())
        self._parts = dict(parts)
        self._weight = Storage(sum(self.sizes), in_features, place=place)
        self._bias = Storage(sum(self.sizes), place=place) if bias else None
        self._product: PackedLinear | None = None

    def slots(self, name: str) -> Slots:
        found: dict[str, Slot] = {}
        begin = 0
        for part, size in self._parts.items():
            rows = slice(begin, begin + size)
            found[f"{part}.weight"] = self._weight.slot(rows)
            if self._bias is not None:
                found[f"{part}.bias"] = self._bias.slot(rows)
            begin += size
        return Slots(found)

    def finalize(self) -> None:
        # The packed copy is the only one from here on.
        self._product = PackedLinear(self._weight.take(), None if self._bias is None else self._bias.take())

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., sum of the parts]."""
        assert self._product is not None, "finalize comes before the first product"
        return self._product(x)
