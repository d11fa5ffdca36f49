"""Where a model's weights live and in which number format: one value that every layer's constructor takes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from inferfleet.engine.group import ALONE, Group


@dataclass(frozen=True, slots=True)
class Place:
    """The dtype that a model computes in and the device that holds it ("meta": shapes only, no memory)."""

    dtype: torch.dtype
    device: torch.device
    #: Who holds the rest of the model.
    group: Group = ALONE

    def empty(self, *shape: int) -> Tensor:
        """Unfilled weights."""
        return torch.empty(shape, dtype=self.dtype, device=self.device)
