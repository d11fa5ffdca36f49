"""A learned vector that stands in a checkpoint under its own bare name: no `.weight` behind it."""

from __future__ import annotations

import torch

from inferfleet.engine.layers.slots import Slots, Weighted


class Vector(Weighted):
    """`values` [size], for example Gemma 4's layer_scalar [1] or a router's scale [H]."""

    def __init__(self, size: int, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.values = torch.empty(size, dtype=dtype, device=device)

    def slots(self, name: str) -> Slots:
        return Slots({name: self.values})
