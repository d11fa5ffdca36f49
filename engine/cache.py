"""The memory of a model's layers between steps, and attention over it. Knows no request and no schedule.

    T tokens of a step, R rows of a step, h query heads, kv key/value heads, d head dim, S state slots

`PagedCache` keeps keys, values and latents in blocks; engine/contiguous.py does the same without blocks, to check it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from inferfleet.engine.cache_spec import CacheSpec, KeyValues, Latent, Recurrent
from inferfleet.kernels.latent_attention import latent_attention, write_latent
from inferfleet.kernels.paged_attention import paged_attention, write_kv

if TYPE_CHECKING:
    from inferfleet.engine.batch import Batch


class Cache(Protocol):
    """What a step needs of a cache; `layer` is an index of spec.layers."""

    spec: CacheSpec
    block_size: int

    def attend(self, batch: Batch, layer: int, q: Tensor, k: Tensor | None, v: Tensor | None, scale: float) -> Tensor:
        """Store k and v [T, kv, d] (None: another layer has stored them) and attend with q [T, h, d] -> [T, h, d]."""
        ...

    def attend_latent(self, batch: Batch, layer: int, q: Tensor, latent: Tensor, scale: float) -> Tensor:
        """Store latent [T, rank + rope_dim] and attend to it with q [T, h, rank + rope_dim] -> [T, h, rank]."""
        ...

    def states(self, layer: int) -> tuple[Tensor, ...]:
        """A recurrent layer's parts, each [S, *shape]; a step updates its rows' slots in place."""
        ...

    def clear_states(self, slots: Sequence[int]) -> None:
        """Zeros, as before a sequence's first token."""
        ...

    def copy_states(self, moves: Sequence[tuple[int, int]]) -> None:
        """Copy whole slots (from, to), one after another."""
        ...


class States:
    """The state slots of all recurrent layers; the same in every cache, because nothing about them is paged."""

    def __init__(self, spec: CacheSpec, num_slots: int, *, dtype: torch.dtype, device: torch.device | str) -> None:
        self.parts: dict[int, tuple[Tensor, ...]] = {}
        for index, layer in enumerate(spec.layers):
            if isinstance(layer, Recurrent):
                self.parts[index] = tuple(
                    torch.zeros((num_slots, *part.shape), dtype=part.dtype or dtype, device=device)
                    for part in layer.parts
                )

    def clear(self, slots: Sequence[int]) -> None:
        if not slots:
            return  # the usual step: where all rows go on, not one operation a layer
        for part in self._all():
            part[list(slots)] = 0

    def copy(self, moves: Sequence[tuple[int, int]]) -> None:
        for part in self._all():
            for source, target in moves:
                part[target].copy_(part[source])

    def _all(self) -> list[Tensor]:
        return [part for parts in self.parts.values() for part in parts]


class PagedCache:
    """Blocks [num_blocks, block_size, ...] for every paged layer: K and V of [kv, d], or a latent of [rank + rope_dim].

    Block 0 of every group is the null block: tables point to it where a row has let go of a block that its sight no
    longer reaches. Places that a row has not written hold whatever their last owner left, NaN included: attention
    never reads them.
    """

    def __init__(
        self,
        spec: CacheSpec,
        num_blocks: Sequence[int],
        block_size: int,
        *,
        num_states: int = 0,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        """num_blocks: for each group, the null block included. num_states: slots, snapshots included."""
        self.spec = spec
        self.block_size = block_size
        self._states = States(spec, num_states, dtype=dtype, device=device)
        #: By layer: keys and values, or the latent alone.
        self.blocks: dict[int, tuple[Tensor, ...]] = {}
        for index, layer in enumerate(spec.layers):
            if isinstance(layer, Recurrent):
                continue
            shape = (num_blocks[spec.group_of(layer)], block_size)
            token = (
                (layer.num_kv_heads, layer.head_dim) if isinstance(layer, KeyValues) else (layer.elements_per_token,)
            )
            count = 2 if isinstance(layer, KeyValues) else 1
            self.blocks[index] = tuple(torch.zeros((*shape, *token), dtype=dtype, device=device) for _ in range(count))

    def attend(self, batch: Batch, layer: int, q: Tensor, k: Tensor | None, v: Tensor | None, scale: float) -> Tensor:
        kind, (keys, values) = self.spec.layers[layer], self.blocks[layer]
        assert isinstance(kind, KeyValues), "attend is for layers with keys and values"
        group = self.spec.group_of(kind)
        if k is not None and v is not None:
            write_kv(k, v, keys, values, batch.slot_mapping[group])
        return paged_attention(
            q,
            keys,
            values,
            batch.block_tables[group],
            batch.query_start,
            batch.seq_lens,
            scale=scale,
            window=kind.sight.window,
            chunk=kind.sight.chunk,
            max_query_len=batch.max_query_len,
        )

    def attend_latent(self, batch: Batch, layer: int, q: Tensor, latent: Tensor, scale: float) -> Tensor:
        kind, (blocks,) = self.spec.layers[layer], self.blocks[layer]
        assert isinstance(kind, Latent), "attend_latent is for layers with a latent"
        group = self.spec.group_of(kind)
        write_latent(latent, blocks, batch.slot_mapping[group])
        return latent_attention(
            q, blocks, batch.block_tables[group], batch.query_start, batch.seq_lens, rank=kind.rank, scale=scale
        )

    def states(self, layer: int) -> tuple[Tensor, ...]:
        return self._states.parts[layer]

    def clear_states(self, slots: Sequence[int]) -> None:
        self._states.clear(slots)

    def copy_states(self, moves: Sequence[tuple[int, int]]) -> None:
        self._states.copy(moves)
