"""Puts checkpoint tensors where the layers want them: a declared table of names, filled in one pass.

A layer that holds weights lists its **slots**: checkpoint name -> what takes the tensor of that name. So q, k and v
land one under another in one matrix, and a bfloat16 file fills a float32 model. A layer is packed as soon as its last
slot is filled: at any time only the layers that wait for the rest of their tensors exist unpacked.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from inferfleet.engine.model_errors import WeightsMismatch
from inferfleet.engine.place import Place
from inferfleet.engine.share import Dim, cut, held, whole
from inferfleet.kernels.quantized import Kind, Quantized

Shape = tuple[int, ...]
#: One weight of a checkpoint, as numbers or as codes.
Weight = Tensor | Quantized


@dataclass(frozen=True)
class Slot:
    """What takes one tensor of a checkpoint."""

    put: Callable[[Any], Any]
    #: As the checkpoint has it. A tensor of another shape is refused, unless that is one of `others`.
    shape: Shape
    others: tuple[Shape, ...] = ()
    layer: Weighted | None = None
    #: Whether `put` takes coded weights too. Where it does not, they are decoded for it.
    takes_codes: bool = False
    #: What a plain weight is coded as when it is put.
    quantization: Kind | None = None
    #: What a plain weight's part takes in memory here, in the number format and the share that the layer keeps.
    num_bytes: int = 0

    @classmethod
    def into(cls, view: Tensor) -> Slot:
        """Copies into memory that is there, converting dtype and device on the way."""
        return cls(view.copy_, tuple(view.shape), num_bytes=view.nbytes)

    @classmethod
    def unused(cls, *shape: int) -> Slot:
        """For a tensor that only another rank of a split model needs."""
        return cls(lambda _: None, shape)

    def takes(self, weight: Weight) -> bool:
        return tuple(weight.shape) in (self.shape, *self.others)

    def fill(self, weight: Weight) -> None:
        """Puts a weight of a shape that it takes."""
        self.put(weight if isinstance(weight, Tensor) or self.takes_codes else weight.dequantised())


@dataclass
class Slots:
    """Where the tensors of a checkpoint go."""

    #: checkpoint name -> its slot
    tensors: dict[str, Slot] = field(default_factory=dict)
    #: a name under which several slots may come as one tensor -> (its slot, the slots that it fills)
    stacks: dict[str, tuple[Slot, tuple[str, ...]]] = field(default_factory=dict)

    def named(self, rename: Callable[[str], str]) -> Slots:
        """The same slots with every name changed."""
        tensors = {rename(name): slot for name, slot in self.tensors.items()}
        stacks = {rename(n): (slot, tuple(map(rename, parts))) for n, (slot, parts) in self.stacks.items()}
        return Slots(tensors, stacks)

    def of(self, layer: Weighted) -> Slots:
        """The same slots, known to belong to `layer`."""
        tensors = {name: replace(slot, layer=layer) for name, slot in self.tensors.items()}
        stacks = {name: (replace(slot, layer=layer), parts) for name, (slot, parts) in self.stacks.items()}
        return Slots(tensors, stacks)

    def add(self, other: Slots) -> None:
        self.tensors |= other.tensors
        self.stacks |= other.stacks


class Storage:
    """Weights of a layer between loading and packing: allocated when the first part comes, given away by `take`."""

    def __init__(self, *dims: Dim, place: Place) -> None:
        self.dims, self.shape, self._place = dims, tuple(map(held, dims)), place
        self._tensor: Tensor | None = None

    @property
    def tensor(self) -> Tensor:
        """The whole of it, allocated now at the latest."""
        if self._tensor is None:
            self._tensor = self._place.empty(*self.shape)
        return self._tensor

    def slot(self, *index: int | slice, dims: Sequence[Dim] = ()) -> Slot:
        """A slot for the part tensor[index]; without an index for the whole.

        dims: the sizes that the checkpoint's tensor is to have, where they differ from the part's: the rank keeps
        its shares of them.
        """
        part_shape = tuple(torch.empty(self.shape, device="meta")[index].shape)
        dims = dims or (part_shape if index else self.dims)
        size = self._num_bytes(part_shape)
        return Slot(lambda part: self.tensor[index].copy_(cut(part, dims)), tuple(map(whole, dims)), num_bytes=size)

    @property
    def num_bytes(self) -> int:
        """Of the whole of it, allocated or not."""
        return self._num_bytes(self.shape)

    def take(self) -> Tensor:
        """Hands the tensor over; this storage is of no use afterwards."""
        whole, self._tensor = self.tensor, None
        return whole

    def _num_bytes(self, shape: Shape) -> int:
        return math.prod(shape) * self._place.dtype.itemsize


class Weighted(nn.Module):
    """A layer with weights of its own.

    They are plain tensors, not parameters: nothing trains here, and `finalize` may replace them by a packed layout.
    """

    is_packed = False

    def slots(self, name: str) -> Slots:
        """The slots of this layer, named from its parent on; `name` is the layer's own name there."""
        raise NotImplementedError

    def finalize(self) -> None:
        """Called once, when the last slot is filled: lays the weights out for the machine."""

    def pack(self) -> None:
        """`finalize`, unless that has been done."""
        if not self.is_packed:
            self.finalize()
            self.is_packed = True


def all_slots(model: nn.Module) -> Slots:
    """The slots of every weighted layer of a model, named by the layer's path in it."""
    found = Slots()
    for path, module in model.named_modules():
        if isinstance(module, Weighted):
            parent, dot, name = path.rpartition(".")
            found.add(module.slots(name).of(module).named((parent + dot).__add__))
    return found


def fill(slots: Slots, weights: Iterable[tuple[str, Weight]], skipped: Iterable[str] = ()) -> None:
    """Gives every tensor to its slot and packs each layer that is complete.

    `skipped` are regular expressions for names that the model declares to have no use for. Raises one WeightsMismatch
    that names all missing, extra and misshapen tensors.
    """
    unused = re.compile("|".join(f"(?:{pattern})" for pattern in skipped) or r"(?!)")
    open_slots = Counter(slot.layer for slot in slots.tensors.values())
    filled: set[str] = set()
    extra: list[str] = []
    misshapen: list[str] = []
    for name, tensor in weights:
        slot, parts = _find(slots, name)
        if slot is None or not filled.isdisjoint(parts):
            if not unused.fullmatch(name):
                extra.append(name)
            continue
        filled.update(parts)
        if not slot.takes(tensor):
            misshapen.append(f"{name} is {list(tensor.shape)} and should be {list(slot.shape)}")
            continue
        slot.fill(tensor)
        open_slots[slot.layer] -= len(parts)
        if slot.layer is not None and not open_slots[slot.layer]:
            slot.layer.pack()
    missing = list(_missing(slots.tensors, slots.stacks, filled))
    if missing or extra or misshapen:
        raise WeightsMismatch(missing, extra, misshapen)


def _find(slots: Slots, name: str) -> tuple[Slot | None, tuple[str, ...]]:
    if name in slots.tensors:
        return slots.tensors[name], (name,)
    return slots.stacks.get(name, (None, ()))


def _missing(
    tensors: Mapping[str, Slot], stacks: Mapping[str, tuple[Slot, tuple[str, ...]]], filled: set[str]
) -> Iterator[str]:
    """Names of unfilled slots; a stack of which nothing came is named once instead of by its parts."""
    covered: set[str] = set()
    for name, (_, parts) in stacks.items():
        if filled.isdisjoint(parts):
            covered.update(parts)
            yield f"{name} (or its {len(parts)} parts, {parts[0]} and so on)"
    yield from (name for name in tensors if name not in filled and name not in covered)
