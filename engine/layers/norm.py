"""Norms over the last dimension, with the weights that their place in a model gives them."""

from __future__ import annotations

from torch import Tensor

from inferfleet.engine.layers.slots import Slot, Slots, Weighted
from inferfleet.engine.place import Place
from inferfleet.kernels import layer_norm, rms_norm, rotary
from inferfleet.kernels.rms_norm import Style


class RMSNorm(Weighted):
    """Normalisation over the last dimension (of a hidden state, or of a head); see kernels/rms_norm.py for styles."""

    def __init__(self, size: int, eps: float, style: Style, *, place: Place) -> None:
        super().__init__()
        self.eps, self.style = eps, style
        self.weight = place.empty(size)

    def slots(self, name: str) -> Slots:
        return Slots({f"{name}.weight": Slot.into(self.weight)})

    def forward(self, x: Tensor) -> Tensor:
        """x [..., size] -> the same shape and dtype."""
        return rms_norm.rms_norm(x, self.weight, self.eps, style=self.style)

    def after_add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(norm(x + residual), x + residual)."""
        return rms_norm.add_rms_norm(x, residual, self.weight, self.eps, style=self.style)

    def then_rotary(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Heads x [T, h, d] normalised and then turned to their positions by cos, sin [T, d]."""
        return rotary.norm_rotary(x, self.weight, self.eps, cos, sin, style=self.style)


class LayerNorm(Weighted):
    """Normalisation by mean and variance, with weight and bias; see kernels/layer_norm.py."""

    def __init__(self, size: int, eps: float, *, place: Place) -> None:
        super().__init__()
        self.eps = eps
        self.weight, self.bias = place.empty(size), place.empty(size)

    def slots(self, name: str) -> Slots:
        return Slots({f"{name}.weight": Slot.into(self.weight), f"{name}.bias": Slot.into(self.bias)})

    def forward(self, x: Tensor) -> Tensor:
        """x [..., size] -> the same shape and dtype."""
        return layer_norm.layer_norm(x, self.weight, self.bias, self.eps)

    def after_add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(norm(x + residual), x + residual)."""
        return layer_norm.add_layer_norm(x, residual, self.weight, self.bias, self.eps)
