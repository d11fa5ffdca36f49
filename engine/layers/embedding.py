"""Token embeddings and the head that turns hidden states back into a score for every token."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from inferfleet.engine.layers.slots import Slot, Slots, Storage, Weighted
from inferfleet.engine.place import Place
from inferfleet.kernels.linear import PackedLinear


class Embedding(Weighted):
    """ids [T] -> [T, size], times a fixed scale that is rounded to the weight's dtype (as Gemma was trained)."""

    def __init__(self, num_tokens: int, size: int, *, scale: float = 1.0, place: Place) -> None:
        super().__init__()
        self.weight = place.empty(num_tokens, size)
        self.scale = torch.tensor(scale, dtype=place.dtype).item()

    def slots(self, name: str) -> Slots:
        return Slots({f"{name}.weight": Slot.into(self.weight)})

    def forward(self, ids: Tensor) -> Tensor:
        rows = F.embedding(ids, self.weight)
        return rows if self.scale == 1.0 else rows * self.scale


class Head(Weighted):
    """Hidden states [N, H] -> float32 logits [N, V]; its weight is its own or the embedding's ("tied").

    On CPU a tied weight exists twice, as rows to look up and packed for the product: that buys a head several
    times faster for one embedding's memory.
    """

    def __init__(self, num_tokens: int, size: int, *, tied: Embedding | None, place: Place) -> None:
        super().__init__()
        self.is_tied = tied is not None
        self._tied = tied
        self._weight = Storage(num_tokens, size, place=place)
        self._product: PackedLinear | None = None

    def slots(self, name: str) -> Slots:
        return Slots() if self.is_tied else Slots({f"{name}.weight": self._weight.slot()})

    def finalize(self) -> None:
        weight = self._weight.take() if self._tied is None else self._tied.weight
        self._product = PackedLinear(weight, to_float=True)

    def forward(self, x: Tensor) -> Tensor:
        assert self._product is not None, "finalize comes before the first product"
        return self._product(x)
