"""The gated MLP that every family here uses: down(act(gate x) * (up x))."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from inferfleet.engine.layers.linear import Linear
from inferfleet.kernels.gated_activation import Kind, gated_activation


class GatedMLP(nn.Module):
    """x [T, H] -> [T, H] through a width of `intermediate`, with gate and up as one product."""

    def __init__(
        self, hidden: int, intermediate: int, activation: Kind, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.activation = activation
        parts = {"gate_proj": intermediate, "up_proj": intermediate}
        self.gate_up = Linear(hidden, parts, dtype=dtype, device=device)
        self.down = Linear(intermediate, {"down_proj": hidden}, dtype=dtype, device=device)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(gated_activation(self.gate_up(x), self.activation))
