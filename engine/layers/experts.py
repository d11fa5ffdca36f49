"""The experts of a mixture layer: stacked weights, from a checkpoint that stores them stacked or one by one.

Which experts a token goes to is the router's business, and routers differ too much between families to share.
"""

from __future__ import annotations

import torch
from torch import Tensor

from inferfleet.engine.layers.slots import Slots, Weighted
from inferfleet.kernels.gated_activation import Kind
from inferfleet.kernels.moe import PackedExperts


class Experts(Weighted):
    """E gated MLPs of width `intermediate`; a token's result is the weighted sum over its chosen ones."""

    def __init__(
        self,
        num_experts: int,
        hidden: int,
        intermediate: int,
        activation: Kind,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.activation = activation
        self._gate_up: Tensor | None = torch.empty(num_experts, 2 * intermediate, hidden, dtype=dtype, device=device)
        self._down: Tensor | None = torch.empty(num_experts, hidden, intermediate, dtype=dtype, device=device)
        self._product: PackedExperts | None = None

    def slots(self, name: str) -> Slots:
        """Both layouts: `experts.N.gate_proj.weight` and the like, or `experts.gate_up_proj` and `.down_proj`."""
        assert self._gate_up is not None and self._down is not None, "slots are asked for before finalize"
        width = self._down.shape[2]
        gate_up_parts: dict[str, Tensor] = {}
        down_parts: dict[str, Tensor] = {}
        for i in range(len(self._down)):
            gate_up_parts[f"{name}.{i}.gate_proj.weight"] = self._gate_up[i, :width]
            gate_up_parts[f"{name}.{i}.up_proj.weight"] = self._gate_up[i, width:]
            down_parts[f"{name}.{i}.down_proj.weight"] = self._down[i]
        stacks = {
            f"{name}.gate_up_proj": (self._gate_up, tuple(gate_up_parts)),
            f"{name}.down_proj": (self._down, tuple(down_parts)),
        }
        return Slots(gate_up_parts | down_parts, stacks)

    def finalize(self) -> None:
        assert self._gate_up is not None and self._down is not None, "finalize runs once"
        self._product = PackedExperts(self._gate_up, self._down, self.activation)
        self._gate_up = self._down = None

    def forward(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """x [T, H], topk_ids and topk_weights [T, K] -> [T, H]."""
        assert self._product is not None, "finalize comes before the first product"
        return self._product(x, topk_ids, topk_weights)
