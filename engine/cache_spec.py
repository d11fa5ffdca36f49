"""What the layers of a model keep between steps, and what it costs. Knows no block and no memory.

    KeyValues   a key and a value for each head and token; how far back they are needed says the sight
    Latent      one vector a token, from which all heads' keys and values are made (MLA)
    Recurrent   tensors of fixed size a sequence, overwritten as it goes on; nothing a token

The first two are **paged**: they lie in blocks, and layers with the same sight share block tables (a **group**).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch

from inferfleet.engine.sight import EVERYTHING, Sight


@dataclass(frozen=True, slots=True)
class KeyValues:
    """Keys and values of one layer."""

    num_kv_heads: int
    head_dim: int
    sight: Sight = EVERYTHING

    def __post_init__(self) -> None:
        if min(self.num_kv_heads, self.head_dim) < 1:
            raise ValueError(f"a layer's num_kv_heads and head_dim must be at least 1: {self}")

    @property
    def elements_per_token(self) -> int:
        return 2 * self.num_kv_heads * self.head_dim


@dataclass(frozen=True, slots=True)
class Latent:
    """The compressed keys and values of one layer: `rank` numbers for both, `rope_dim` turned ones for the keys."""

    rank: int
    rope_dim: int
    sight: Sight = EVERYTHING

    def __post_init__(self) -> None:
        if min(self.rank, self.rope_dim) < 1:
            raise ValueError(f"a latent's rank and rope_dim must be at least 1: {self}")

    @property
    def elements_per_token(self) -> int:
        return self.rank + self.rope_dim


@dataclass(frozen=True, slots=True)
class StatePart:
    """One tensor of a sequence's state; dtype None = the model's."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None = None


@dataclass(frozen=True, slots=True)
class Recurrent:
    """The state that one layer keeps for a sequence."""

    parts: tuple[StatePart, ...]

    def num_bytes(self, dtype: torch.dtype) -> int:
        """Bytes a sequence in a model of this dtype."""
        return sum(math.prod(part.shape) * (part.dtype or dtype).itemsize for part in self.parts)


LayerKind = KeyValues | Latent | Recurrent


@dataclass(frozen=True)
class CacheSpec:
    """The layers that keep something, in the model's order. A layer that reads another's names that one's index."""

    layers: tuple[LayerKind, ...]

    def __post_init__(self) -> None:
        if not self.sights:
            raise ValueError("a cache needs at least one layer with keys and values")

    @cached_property
    def sights(self) -> tuple[Sight, ...]:
        """The sight of each group, in order of first use."""
        return tuple(dict.fromkeys(layer.sight for layer in self.layers if not isinstance(layer, Recurrent)))

    def group_of(self, layer: KeyValues | Latent) -> int:
        return self.sights.index(layer.sight)

    def elements_per_token(self, group: int) -> int:
        """Numbers that one token costs in all layers of a group."""
        sight = self.sights[group]
        paged = (layer for layer in self.layers if not isinstance(layer, Recurrent))
        return sum(layer.elements_per_token for layer in paged if layer.sight == sight)

    @cached_property
    def has_states(self) -> bool:
        return any(isinstance(layer, Recurrent) for layer in self.layers)

    def state_bytes(self, dtype: torch.dtype) -> int:
        """Bytes that one sequence's states take in all layers."""
        return sum(layer.num_bytes(dtype) for layer in self.layers if isinstance(layer, Recurrent))
