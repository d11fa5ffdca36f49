"""A learned vector that stands in a checkpoint under its own bare name: no `.weight` behind it."""

from __future__ import annotations

from inferfleet.engine.layers.slots import Slot, Slots, Weighted
from inferfleet.engine.place import Place
from inferfleet.engine.share import Dim, cut, held, whole


class Vector(Weighted):
    """`values` [size], for example Gemma 4's layer_scalar [1] or a router's scale [H]."""

    def __init__(self, size: Dim, *, place: Place) -> None:
        super().__init__()
        self._size = size
        self.values = place.empty(held(size))

    def slots(self, name: str) -> Slots:
        put, shape = lambda vector: self.values.copy_(cut(vector, [self._size])), (whole(self._size),)
        return Slots({name: Slot(put, shape, num_bytes=self.values.nbytes)})
