"""Token embeddings and the head that turns hidden states back into a score for every token.

In a split model each rank has some of the vocabulary's rows in both. So a head can be tied to its embedding as ever,
and the largest tables of small models (Gemma's per-layer embeddings) shrink with the number of ranks; the price is one
sum for each lookup, exact, because all ranks but one bring zeros.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from inferfleet.engine.layers.slots import Slot, Slots, Storage, Weighted
from inferfleet.engine.place import Place
from inferfleet.engine.share import cut
from inferfleet.kernels.linear import PackedLinear


class Embedding(Weighted):
    """ids [T] -> [T, size], times a fixed scale that is rounded to the weight's dtype (as Gemma was trained)."""

    def __init__(self, num_tokens: int, size: int, *, scale: float = 1.0, place: Place) -> None:
        super().__init__()
        self.rows = place.group.width(num_tokens, "vocab_size")
        self.weight = place.empty(self.rows.size, size)
        self.scale = torch.tensor(scale, dtype=place.dtype).item()
        self._group = place.group

    def slots(self, name: str) -> Slots:
        put, shape = lambda table: self.weight.copy_(cut(table, [self.rows])), (self.rows.whole, self.weight.shape[1])
        return Slots({f"{name}.weight": Slot(put, shape, num_bytes=self.weight.nbytes)})

    def forward(self, ids: Tensor) -> Tensor:
        rows = self._split_lookup(ids) if self.rows.is_split else F.embedding(ids, self.weight)
        return rows if self.scale == 1.0 else rows * self.scale

    def _split_lookup(self, ids: Tensor) -> Tensor:
        """Each rank brings the rows it has, and zeros for the others."""
        begin, end = self.rows.stretches[0]
        foreign = (ids < begin) | (ids >= end)
        rows = F.embedding((ids - begin).masked_fill(foreign, 0), self.weight)
        return self._group.sum(rows.masked_fill(foreign[:, None], 0))


class Head(Weighted):
    """Hidden states [N, H] -> float32 logits [N, V]; its weight is its own or the embedding's ("tied"), a bias its own.

    On CPU a tied weight exists twice, as rows to look up and packed for the product: that buys a head several
    times faster for one embedding's memory.
    """

    def __init__(self, num_tokens: int, size: int, *, tied: Embedding | None, bias: bool = False, place: Place) -> None:
        super().__init__()
        self.is_tied = tied is not None
        self._tied = tied
        self._num_tokens, self._group = num_tokens, place.group
        rows = place.group.width(num_tokens, "vocab_size")
        self._weight = Storage(rows, size, place=place)
        self._bias = Storage(rows, place=place) if bias else None
        self._product: PackedLinear | None = None

    def slots(self, name: str) -> Slots:
        found = {} if self.is_tied else {f"{name}.weight": self._weight.slot()}
        if self._bias is not None:
            found[f"{name}.bias"] = self._bias.slot()
        return Slots(found)

    def finalize(self) -> None:
        weight = self._weight.take() if self._tied is None else self._tied.weight
        self._product = PackedLinear(weight, None if self._bias is None else self._bias.take(), to_float=True)

    def forward(self, x: Tensor) -> Tensor:
        assert self._product is not None, "finalize comes before the first product"
        return self._group.gather(self._product(x), self._num_tokens)
