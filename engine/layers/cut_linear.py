"""A projection of which a caller may use only a corner: its first outputs over its first inputs, where they lie."""

from __future__ import annotations

from torch import Tensor

from inferfleet.engine.layers.linear import Linear
from inferfleet.engine.place import Place
from inferfleet.engine.share import Dim
from inferfleet.kernels.linear import PackedLinear


class CutLinear(Linear):
    """y = x @ W[:outputs, :inputs].T without a second copy of any weight."""

    def __init__(self, in_features: Dim, name: str, out_features: Dim, *, is_cut: bool, place: Place) -> None:
        """is_cut: whether anybody will ask for less than the whole; the layouts that allow it may be slower."""
        super().__init__(in_features, {name: out_features}, place=place)
        self.is_cut = is_cut

    def finalize(self) -> None:
        if self._weight.is_coded and not self.is_cut:
            super().finalize()
        else:
            self._product = PackedLinear(self._weight.take(), can_cut=self.is_cut)

    def corner(self, x: Tensor, outputs: int) -> Tensor:
        """x [T, inputs] with inputs <= in_features -> [T, outputs]: as many of both as this rank has of the corner."""
        assert self._product is not None, "finalize comes before the first product"
        if not isinstance(self._product, PackedLinear):  # coded only where nobody asks for less than the whole
            y = self._product(x)
        elif x.shape[1] and outputs:
            y = self._product.corner(x, outputs)
        else:
            y = x.new_zeros(len(x), outputs)
        return y if self._group is None else self._group.sum(y)
