"""Matrix products of a model: one per place, holding the projections that share an input one under another."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from inferfleet.engine.layers.slots import Slots, Weighted
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
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.sizes = tuple(parts.values())
        self._parts = dict(parts)
        self._weight: Tensor | None = torch.empty(sum(self.sizes), in_features, dtype=dtype, device=device)
        self._bias = torch.empty(sum(self.sizes), dtype=dtype, device=device) if bias else None
        self._product: PackedLinear | None = None

    def slots(self, name: str) -> Slots:
        assert self._weight is not None, "slots are asked for before finalize"
        views: dict[str, Tensor] = {}
        begin = 0
        for part, size in self._parts.items():
            views[f"{part}.weight"] = self._weight[begin : begin + size]
            if self._bias is not None:
                views[f"{part}.bias"] = self._bias[begin : begin + size]
            begin += size
        return Slots(views)

    def finalize(self) -> None:
        assert self._weight is not None, "finalize runs once"
        self._product = PackedLinear(self._weight, self._bias)
        self._weight = None  # the packed copy is the only one from here on

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., sum of the parts]."""
        assert self._product is not None, "finalize comes before the first product"
        return self._product(x)
