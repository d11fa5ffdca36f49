"""The keys and values of the layers that own some, and attention over them. Knows no request and no schedule.

    T tokens of a step, R rows of a step, h query heads, kv key/value heads, d head dim

Layers with the same window share a group: one set of block tables serves them all. `KVCache` is paged;
`ContiguousCache` holds one stretch of memory for each row and does its own plain attention, so that it checks
block tables, slot mappings and kernels rather than repeats them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from inferfleet.kernels.paged_attention import paged_attention, write_kv

if TYPE_CHECKING:
    from inferfleet.engine.batch import Batch


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """What one layer that owns keys and values stores for a token."""

    num_kv_heads: int
    head_dim: int
    #: Keys that a query sees, itself included; None = all.
    window: int | None = None

    def __post_init__(self) -> None:
        if min(self.num_kv_heads, self.head_dim, 1 if self.window is None else self.window) < 1:
            raise ValueError(f"a layer's num_kv_heads, head_dim and window must be at least 1: {self}")

    @property
    def elements_per_token(self) -> int:
        return 2 * self.num_kv_heads * self.head_dim


@dataclass(frozen=True)
class CacheSpec:
    """The layers that own keys and values, in the model's order. A layer that shares names its owner's index."""

    layers: tuple[LayerSpec, ...]

    def __post_init__(self) -> None:
        if not self.layers:
            raise ValueError("a cache needs at least one layer")

    @cached_property
    def windows(self) -> tuple[int | None, ...]:
        """The window of each group, in order of first use."""
        return tuple(dict.fromkeys(layer.window for layer in self.layers))

    @cached_property
    def group_of(self) -> tuple[int, ...]:
        """The group of each layer."""
        return tuple(self.windows.index(layer.window) for layer in self.layers)

    def elements_per_token(self, group: int) -> int:
        """Numbers that one token costs in all layers of a group."""
        return sum(layer.elements_per_token for layer, g in zip(self.layers, self.group_of, strict=True) if g == group)


class Cache(Protocol):
    """What a step needs of a cache."""

    spec: CacheSpec
    block_size: int

    def attend(self, batch: Batch, layer: int, q: Tensor, k: Tensor | None, v: Tensor | None, scale: float) -> Tensor:
        """Store k and v [T, kv, d] (None: another layer has stored them) and attend with q [T, h, d] -> [T, h, d]."""
        ...


class KVCache:
    """Paged keys and values: for each layer K and V of [num_blocks, block_size, kv, d].

    Block 0 of every group is the null block: tables point to it where a windowed row has let go of a block. Slots that
    a row has not written hold whatever their last owner left, NaN included: attention never reads them.
    """

    def __init__(
        self,
        spec: CacheSpec,
        num_blocks: Sequence[int],
        block_size: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        """num_blocks: for each group, the null block included."""
        self.spec = spec
        self.block_size = block_size
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        for layer, group in zip(spec.layers, spec.group_of, strict=True):
            shape = (num_blocks[group], block_size, layer.num_kv_heads, layer.head_dim)
            self.keys.append(torch.zeros(shape, dtype=dtype, device=device))
            self.values.append(torch.zeros(shape, dtype=dtype, device=device))

    def attend(self, batch: Batch, layer: int, q: Tensor, k: Tensor | None, v: Tensor | None, scale: float) -> Tensor:
        keys, values, group = self.keys[layer], self.values[layer], self.spec.group_of[layer]
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
            window=self.spec.layers[layer].window,
            max_query_len=batch.max_query_len,
        )


class ContiguousCache(KVCache):
    """The same face with one block as long as the longest context: `paged_attn=False`.

    A row's context is one slice, and attention is written out in float32 torch. No null block: block b of the
    tables is stretch b - 1.
    """

    def __init__(
        self,
        spec: CacheSpec,
        num_blocks: Sequence[int],
        block_size: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        super().__init__(spec, [count - 1 for count in num_blocks], block_size, dtype=dtype, device=device)

    def attend(self, batch: Batch, layer: int, q: Tensor, k: Tensor | None, v: Tensor | None, scale: float) -> Tensor:
        keys, values, group = self.keys[layer], self.values[layer], self.spec.group_of[layer]
        out = torch.empty_like(q)
        begin = 0
        for row, (query_len, seq_len) in enumerate(batch.row_lens):
            end = begin + query_len
            stretch = int(batch.block_tables[group][row, 0]) - 1
            if k is not None and v is not None:
                keys[stretch, seq_len - query_len : seq_len] = k[begin:end]
                values[stretch, seq_len - query_len : seq_len] = v[begin:end]
            out[begin:end] = _attend_row(
                q[begin:end],
                keys[stretch, :seq_len],
                values[stretch, :seq_len],
                scale,
                self.spec.layers[layer].window,
            )
            begin = end
        return out


def _attend_row(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
    """q [n, h, d] are the last n of the m tokens in k, v [m, kv, d] -> [n, h, d] in q's dtype."""
    n, h, d = q.shape
    m, kv, _ = k.shape
    grouped = q.float().reshape(n, kv, h // kv, d)
    scores = torch.einsum("nkgd,mkd->kgnm", grouped, k.float()) * scale
    query = torch.arange(m - n, m, device=q.device)[:, None]
    key = torch.arange(m, device=q.device)[None, :]
    hidden = key > query if window is None else (key > query) | (key <= query - window)
    weights = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1)
    return torch.einsum("kgnm,mkd->nkgd", weights, v.float()).reshape(n, h, d).to(q.dtype)
