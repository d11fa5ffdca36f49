"""A learned vector that stands in a checkpoint under its own bare name: no `.weight` behind it."""

from __future__ import annotations

from inferfleet.engine.layers.slots import Slot, Slots, Weighted
from inferfleet.engine.place import Place


class Vector(Weighted):
    """`values` [size], for example Gemma 4's layer_scalar [1] or a router's scale [H]."""

    def __init__(self, size: int, *, place: Place) -> None:
        super().__init__()
        self.values = place.empty(size)

    def slots(self, name: str) -> Slots:
        return Slots({name: Slot.into(self.values)})
