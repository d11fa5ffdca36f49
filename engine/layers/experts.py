"""The experts of a mixture layer: stacked weights, from a checkpoint that stores them stacked or one by one.

Which experts a token goes to is the router's business, and routers differ too much between families to share.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor

from inferfleet.engine.layers.matrix import MatrixStack, Part, product_of
from inferfleet.engine.layers.slots import Slot, Slots, Weighted
from inferfleet.engine.place import Place
from inferfleet.kernels.gated_activation import Kind
from inferfleet.kernels.moe import PackedExperts
from inferfleet.kernels.quantized import Quantized
from inferfleet.kernels.quantized_experts import FusedExperts, SingleExperts, can_fuse

Mixture = PackedExperts | FusedExperts | SingleExperts


class Experts(Weighted):
    """E gated MLPs of width `intermediate`; a token's result is the weighted sum over its chosen ones.

    In a split model each rank has a part of every expert's width. Stacks come as [E, outputs, inputs] or, in Qwen3-VL's
    published files, as [E, inputs, outputs]: their shapes tell.
    """

    #: What checkpoints call the three matrices of one expert: gate, up, down.
    parts = ("gate_proj", "up_proj", "down_proj")

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
        self._group, self._dtype = place.group, place.dtype
        self._width = width = place.group.width(intermediate, "moe_intermediate_size")
        self._gate_up = MatrixStack(num_experts, width.then(width), hidden, place=place)
        self._down = MatrixStack(num_experts, hidden, width, place=place)
        #: Whether the stacks of this checkpoint are [E, inputs, outputs].
        self._turned = False
        #: A stack of square matrices: its shape tells nothing, so it waits for the other one, which is never square.
        self._square: tuple[Slot, Tensor] | None = None
        self._product: Mixture | None = None
        #: Called with the topk_ids [T, K] of every step, where somebody wants to know them.
        self.recorder: Callable[[Tensor], None] | None = None

    def slots(self, name: str) -> Slots:
        """Both layouts: `experts.N.gate_proj.weight` and the like, or `experts.gate_up_proj` and `.down_proj`."""
        count, hidden, width = self._down.shape
        rows, columns = (self._width, hidden), (hidden, self._width)
        gate, up, down = self.parts
        gate_up_slots: dict[str, Slot] = {}
        down_slots: dict[str, Slot] = {}
        for i in range(count):
            gate_up_slots[f"{name}.{i}.{gate}.weight"] = self._gate_up.slot(i, slice(width), dims=rows)
            gate_up_slots[f"{name}.{i}.{up}.weight"] = self._gate_up.slot(i, slice(width, None), dims=rows)
            down_slots[f"{name}.{i}.{down}.weight"] = self._down.slot(i, dims=columns)
        stacks = {
            f"{name}.gate_up_proj": (self._stack(self._gate_up), tuple(gate_up_slots)),
            f"{name}.down_proj": (self._stack(self._down), tuple(down_slots)),
        }
        return Slots(gate_up_slots | down_slots, stacks)

    def finalize(self) -> None:
        self._place_square()
        if self._gate_up.is_coded or self._down.is_coded:
            self._product = self._coded_mixture()
        else:
            self._product = PackedExperts(self._gate_up.take(), self._down.take(), self.activation)

    def _coded_mixture(self) -> Mixture:
        gate_up = [matrix.take_parts() for matrix in self._gate_up.matrices]
        down = [matrix.take_parts() for matrix in self._down.matrices]
        first, second = _single(gate_up), _single(down)
        if first and second and all(can_fuse(w, w[0].codes.device, self._dtype) for w in (first, second)):
            gate_up.clear()
            down.clear()
            return FusedExperts(first, second, self.activation, dtype=self._dtype)
        pairs = [
            (product_of(wide, None, self._dtype), product_of(narrow, None, self._dtype))
            for wide, narrow in zip(gate_up, down, strict=True)
        ]
        return SingleExperts(pairs, self.activation)

    def forward(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """x [T, H], topk_ids and topk_weights [T, K] -> [T, H]."""
        assert self._product is not None, "finalize comes before the first product"
        if self.recorder is not None:
            self.recorder(topk_ids)
        return self._group.sum(self._product(x, topk_ids, topk_weights))

    def _stack(self, matrices: MatrixStack) -> Slot:
        plain = matrices.whole_slot()
        count, outputs, inputs = plain.shape
        return replace(plain, put=lambda stack: self._put(plain, stack), others=((count, inputs, outputs),))

    def _put(self, plain: Slot, stack: Tensor) -> None:
        if plain.shape[1] == plain.shape[2]:
            self._square = plain, stack
            return
        self._turned = tuple(stack.shape) != plain.shape
        plain.put(stack.transpose(1, 2) if self._turned else stack)

    def _place_square(self) -> None:
        """Both stacks cannot be square (2 * width = hidden = width), so by now the other one has told."""
        if self._square is not None:
            plain, stack = self._square
            plain.put(stack.transpose(1, 2) if self._turned else stack)
            self._square = None


def _single(of_experts: Sequence[Sequence[Part]]) -> list[Quantized]:
    """The weight of each expert, if each is one coded part; else none."""
    found = [parts[0] for parts in of_experts if len(parts) == 1 and isinstance(parts[0], Quantized)]
    return found if len(found) == len(of_experts) else []
