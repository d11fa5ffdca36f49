"""LoRA adapters that stay loaded beside a transformer, chosen picture by picture with a scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from inferfleet.engine.diffusion.deltas import Delta, Deltas, Row, Selection, Up
from inferfleet.engine.diffusion.linears import Projection
from inferfleet.engine.diffusion.lora_files import Adapter, Pair, read_adapter
from inferfleet.engine.diffusion.params import LoraChoice
from inferfleet.engine.progress import Progress


class LoraBank:
    """The adapters of one transformer, by the names of the settings."""

    def __init__(self, transformer: Any) -> None:
        """transformer: one of `load_transformer`; type checkers take diffusers' class for no nn.Module."""
        #: The module's path without its own name ("transformer_blocks.0.attn") -> its product.
        self._products: list[tuple[str, Projection]] = [
            (path.rpartition(".")[0], module)
            for path, module in transformer.named_modules()
            if isinstance(module, Projection)
        ]
        self._selection = Selection()
        self._bytes: dict[str, int] = {}

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._bytes)

    @property
    def num_bytes(self) -> int:
        """Memory of all adapters."""
        return sum(self._bytes.values())

    @property
    def modules(self) -> dict[str, tuple[int, int]]:
        """What an adapter may change: diffusers' path -> (outputs, inputs)."""
        return {
            _path(parent, part): (size, product.inputs)
            for parent, product in self._products
            for part, size in product.parts.items()
        }

    def add(self, adapter: Adapter) -> None:
        """Makes an adapter that was read for these modules one that can be chosen."""
        size = 0
        for parent, product in self._products:
            if (delta := _delta(adapter.pairs, parent, product)) is not None:
                if product.deltas is None:
                    product.deltas = Deltas(self._selection)
                product.deltas.of[adapter.name] = delta
                size += delta.nbytes
        self._bytes[adapter.name] = size

    def select(self, rows: Sequence[Sequence[LoraChoice]]) -> None:
        """What each picture of the next transformer calls has chosen, in the order of the batch."""
        found: list[Row] = [tuple((choice.name, choice.scale) for choice in row if choice.scale) for row in rows]
        self._selection.rows = found if any(found) else ()


def load_loras(transformer: Any, sources: Mapping[str, str], progress: Progress | None = None) -> LoraBank:
    """sources: name -> file, folder or hub id. Raises BadAdapter or one of the hub's ModelErrors, by adapter."""
    bank = LoraBank(transformer)
    for name, source in sources.items():
        bank.add(read_adapter(name, source, bank.modules, progress))
    return bank


def _path(parent: str, part: str) -> str:
    return f"{parent}.{part}" if parent else part


def _delta(pairs: Mapping[str, Pair], parent: str, product: Projection) -> Delta | None:
    """What an adapter has for the parts of one product, in its number format and where it is."""
    downs: list[Tensor] = []
    ups: list[Up] = []
    row, begin = 0, 0
    #: An A that several parts share is kept once.
    places: dict[int, slice] = {}
    for part, size in product.parts.items():
        outputs = slice(begin, begin := begin + size)
        if (pair := pairs.get(_path(parent, part))) is None:
            continue
        if id(pair.down) not in places:
            places[id(pair.down)] = slice(row, row := row + len(pair.down))
            downs.append(pair.down)
        up = pair.up.to(product.place.device, product.place.dtype).contiguous()
        ups.append(Up(outputs, places[id(pair.down)], up, pair.factor))
    if not ups:
        return None
    return Delta(torch.cat(downs).to(product.place.device, product.place.dtype), tuple(ups))
