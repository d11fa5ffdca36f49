"""The gated MLP that every family here uses: down(act(gate x) * (up x))."""

from __future__ import annotations

from torch import Tensor, nn

from inferfleet.engine.layers.linear import Linear
from inferfleet.engine.place import Place
from inferfleet.kernels.gated_activation import Kind, gated_activation


class GatedMLP(nn.Module):
    """x [T, H] -> [T, H] through a width of `intermediate`, with gate and up as one product.

    In a split model each rank has a part of the width.
    """

    def __init__(self, hidden: int, intermediate: int, activation: Kind, *, place: Place) -> None:
        super().__init__()
        self.activation = activation
        width = place.group.width(intermediate, "intermediate size")
        self.gate_up = Linear(hidden, {"gate_proj": width, "up_proj": width}, place=place)
        self.down = Linear(width, {"down_proj": hidden}, place=place)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(gated_activation(self.gate_up(x), self.activation))
