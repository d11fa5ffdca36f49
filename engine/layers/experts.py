"""The experts of a mixture layer: stacked weights, from a checkpoint that stores them stacked or one by one.

Which experts a token goes to is the router's business, and routers differ too much between families to share.
"""

from __future__ import annotations

from torch import Tensor

from inferfleet.engine.layers.slots import Slot, Slots, Storage, Weighted
from inferfleet.engine.place import Place
from inferfleet.kernels.gated_activation import Kind
from inferfleet.kernels.moe import PackedExperts


class Experts(Weighted):
    """E gated MLPs of width `intermediate`; a token's result is the weighted sum over its chosen ones.

    In a split model each rank has a part of every expert's width.
    """

    def __init__(
        self,
        num_experts: int,
        hidden: int,
        intermediate: int,
        activation: Kind,
        *,
        place: Place,
    ) -> None:
        super().__init__()
        self.activation = activation
        self._group = place.group
        self._width = width = place.group.width(intermediate, "moe_intermediate_size")
        self._gate_up = Storage(num_experts, width.then(width), hidden, place=place)
        self._down = Storage(num_experts, hidden, width, place=place)
        self._product: PackedExperts | None = None

    def slots(self, name: str) -> Slots:
        """Both layouts: `experts.N.gate_proj.weight` and the like, or `experts.gate_up_proj` and `.down_proj`."""
        count, hidden, width = self._down.shape
        rows, columns = (self._width, hidden), (hidden, self._width)
        gate_up: dict[str, Slot] = {}
        down: dict[str, Slot] = {}
        for i in range(count):
            gate_up[f"{name}.{i}.gate_proj.weight"] = self._gate_up.slot(i, slice(width), dims=rows)
            gate_up[f"{name}.{i}.up_proj.weight"] = self._gate_up.slot(i, slice(width, None), dims=rows)
            down[f"{name}.{i}.down_proj.weight"] = self._down.slot(i, dims=columns)
        stacks = {
            f"{name}.gate_up_proj": (self._gate_up.slot(), tuple(gate_up)),
            f"{name}.down_proj": (self._down.slot(), tuple(down)),
        }
        return Slots(gate_up | down, stacks)

    def finalize(self) -> None:
        self._product = PackedExperts(self._gate_up.take(), self._down.take(), self.activation)

    def forward(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """x [T, H], topk_ids and topk_weights [T, K] -> [T, H]."""
        assert self._product is not None, "finalize comes before the first product"
        return self._group.sum(self._product(x, topk_ids, topk_weights))
