"""Where a model's weights live and in which number format: one value that every layer's constructor takes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from inferfleet.engine.group import ALONE, Group
from inferfleet.kernels.quantized import Kind


@dataclass(frozen=True, slots=True)
class Place:
    """The dtype that a model computes in and the device that holds it ("meta": shapes only, no memory)."""

    dtype: torch.dtype
    device: torch.device
    #: Who holds the rest of the model.
    group: Group = ALONE
    #: What weights of products become as they are read; None = they stay as the checkpoint has them.
    quantization: Kind | None = None

    @property
    def exact(self) -> Place:
        """This place for what is never quantised here: a router's small errors would send tokens to other experts."""
        return replace(self, quantization=None)

    def empty(self, *shape: int) -> Tensor:
        """Unfilled weights."""
        return torch.empty(shape, dtype=self.dtype, device=self.device)
