"""A projection of which a caller may use only a corner: its first outputs over its first inputs, where they lie."""

from __future__ import annotations

from torch import Tensor

from inferfleet.engine.layers.linear import Linear
from inferfleet.engine.place import Place
from inferfleet.kernels.linear import PackedLinear


class CutLinear(Linear):
    """y = x @ W[:outputs, :inputs].T without a second copy of any weight."""

    def __init__(self, in_features: int, name: str, out_features: int, *, is_cut: bool, place: Place) -> None:
        """is_cut: whether anybody will ask for less than the whole; the layouts that allow it may be slower."""
        super().__init__(in_features, {name: out_features}, place=place)
        self.is_cut = is_cut

    def finalize(self) -> None:
        self._product = PackedLinear(self._weight.take(), can_cut=self.is_cut)

    def corner(self, x: Tensor, outputs: int) -> Tensor:
        """x [T, inputs] with inputs <= in_features -> [T, outputs]."""
        assert self._product is not None, "finalize comes before the first product"
        return self._product.corner(x, outputs)
