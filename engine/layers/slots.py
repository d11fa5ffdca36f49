"""Puts checkpoint tensors where the layers want them: a declared table of names, filled in one pass.

A layer that holds weights lists its **slots**: checkpoint name -> a view of its own storage. So q, k and v land one
under another in one matrix, a bfloat16 file fills a float32 model, and no second copy of the model exists at any time.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from inferfleet.engine.model_errors import WeightsMismatch


@dataclass
class Slots:
    """Where the tensors of a checkpoint go."""

    #: checkpoint name -> the view to copy into
    views: dict[str, Tensor] = field(default_factory=dict)
    #: a name under which several slots may come as one tensor -> (its view, the slots that it fills)
    stacks: dict[str, tuple[Tensor, tuple[str, ...]]] = field(default_factory=dict)

    def named(self, rename: Callable[[str], str]) -> Slots:
        """The same slots with every name changed."""
        views = {rename(name): view for name, view in self.views.items()}
        stacks = {rename(n): (view, tuple(map(rename, parts))) for n, (view, parts) in self.stacks.items()}
        return Slots(views, stacks)

    def add(self, other: Slots) -> None:
        self.views |= other.views
        self.stacks |= other.stacks


class Weighted(nn.Module):
    """A layer with weights of its own.

    They are plain tensors, not parameters: nothing trains here, and `finalize` may replace them by a packed layout.
    """

    def slots(self, name: str) -> Slots:
        """The slots of this layer, named from its parent on; `name` is the layer's own name there."""
        raise NotImplementedError

    def finalize(self) -> None:
        """Called once after loading: lays the weights out for the machine."""


def all_slots(model: nn.Module) -> Slots:
    """The slots of every weighted layer of a model, named by the layer's path in it."""
    found = Slots()
    for path, module in model.named_modules():
        if isinstance(module, Weighted):
            parent, dot, name = path.rpartition(".")
            found.add(module.slots(name).named((parent + dot).__add__))
    return found


def fill(slots: Slots, weights: Iterable[tuple[str, Tensor]], skipped: Iterable[str] = ()) -> None:
    """Copies every tensor into its slot, converting dtype and device on the way.

    `skipped` are regular expressions for names that the model declares to have no use for. Raises one WeightsMismatch
    that names all missing, extra and misshapen tensors.
    """
    unused = re.compile("|".join(f"(?:{pattern})" for pattern in skipped) or r"(?!)")
    filled: set[str] = set()
    extra: list[str] = []
    misshapen: list[str] = []
    for name, tensor in weights:
        view, parts = _find(slots, name)
        if view is None or not filled.isdisjoint(parts):
            if not unused.fullmatch(name):
                extra.append(name)
            continue
        filled.update(parts)
        if view.shape != tensor.shape:
            misshapen.append(f"{name} is {list(tensor.shape)} and should be {list(view.shape)}")
        else:
            view.copy_(tensor)
    missing = list(_missing(slots.views, slots.stacks, filled))
    if missing or extra or misshapen:
        raise WeightsMismatch(missing, extra, misshapen)


def _find(slots: Slots, name: str) -> tuple[Tensor | None, tuple[str, ...]]:
    if name in slots.views:
        return slots.views[name], (name,)
    return slots.stacks.get(name, (None, ()))


def _missing(
    views: Mapping[str, Tensor], stacks: Mapping[str, tuple[Tensor, tuple[str, ...]]], filled: set[str]
) -> Iterator[str]:
    """Names of unfilled slots; a stack of which nothing came is named once instead of by its parts."""
    covered: set[str] = set()
    for name, (_, parts) in stacks.items():
        if filled.isdisjoint(parts):
            covered.update(parts)
            yield f"{name} (or its {len(parts)} parts, {parts[0]} and so on)"
    yield from (name for name in views if name not in filled and name not in covered)
