"""How an engine's cache is laid out: what rank 0 decides, and every rank of a split model builds alike."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from inferfleet.engine.batch import BatchBuilder
from inferfleet.engine.cache import PagedCache
from inferfleet.engine.cache_spec import CacheSpec
from inferfleet.engine.contiguous import ContiguousCache


@dataclass(frozen=True, slots=True)
class CacheLayout:
    """Sizes of the cache and of its block tables; plain values, so that they can travel."""

    #: For each group, the null block included.
    num_blocks: list[int]
    block_size: int
    #: Slots of recurrent states, copies included.
    num_states: int
    is_paged: bool
    max_num_seqs: int
    #: Blocks of the longest context.
    table_width: int
    max_num_batched_tokens: int

    def cache(self, spec: CacheSpec, dtype: torch.dtype, device: torch.device) -> PagedCache:
        """The memory, for a model's (share of its) layers."""
        kind = PagedCache if self.is_paged else ContiguousCache
        sizes = self.num_blocks, self.block_size
        return kind(spec, *sizes, num_states=self.num_states, dtype=dtype, device=device)

    def builder(self, cache: PagedCache, device: torch.device) -> BatchBuilder:
        """For a rank that has no block manager: its tables stay empty, the batches come ready."""
        tables = [np.zeros((self.max_num_seqs, self.table_width), dtype=np.int32) for _ in self.num_blocks]
        return BatchBuilder(cache, tables, max_num_batched_tokens=self.max_num_batched_tokens, device=device)
