"""Who owns which block of the cache. Knows nothing of tensors: a block is a number.

Layers with the same sight form a group with a pool of blocks of its own. A running request has a slot: a row in
every group's block table, which the batch reads as it stands, and a place for its recurrent state. A full block whose
keys and values are computed gets its prefix's hash; when its last owner lets go it keeps the hash and waits, least
recently used first, to be found again or to be reused.

    table of a windowed group:   0 0 0 7 9 4        0 = null block: behind the window, given back
                                       ^ first live
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from inferfleet.engine.block_pool import NULL_BLOCK, BlockPool
from inferfleet.engine.prefix import PrefixHasher, longest_prefix
from inferfleet.engine.request import Request
from inferfleet.engine.sight import Sight
from inferfleet.engine.snapshots import DECODE_INTERVAL, Snapshots


@dataclass(frozen=True, slots=True)
class GroupSize:
    """What a group's layers see, and how many blocks its pool has, the null block included."""

    sight: Sight
    num_blocks: int


class BlockManager:
    """Slots, block tables and the prefix cache over all groups."""

    def __init__(
        self,
        groups: Sequence[GroupSize],
        block_size: int,
        *,
        max_num_seqs: int,
        max_model_len: int,
        hasher: PrefixHasher | None,
        num_snapshots: int | None = None,
    ) -> None:
        """hasher None: no prefix cache. num_snapshots: for a model with recurrent state, whose every hit needs one."""
        self.block_size = block_size
        self.sights = [group.sight for group in groups]
        self.pools = [BlockPool(group.num_blocks) for group in groups]
        width = -(-max_model_len // block_size)
        self.tables = [np.zeros((max_num_seqs, width), dtype=np.int32) for _ in groups]
        self.prefix_queries = 0
        self.prefix_hits = 0
        self._hasher = None if num_snapshots == 0 else hasher
        self.snapshots: Snapshots | None = None
        if self._hasher is not None and num_snapshots is not None:
            self.snapshots = Snapshots(max_num_seqs, num_snapshots)
        self._free_slots = list(range(max_num_seqs - 1, -1, -1))
        #: Blocks [first, end) of a slot's table are held: first per slot and group, end per slot.
        self._first = [[0] * len(groups) for _ in range(max_num_seqs)]
        self._end = [0] * max_num_seqs
        #: Per slot: blocks whose hash has been offered to the pools.
        self._named = [0] * max_num_seqs
        #: Per slot: tokens at the beginning that somebody else has computed as well, as far as the pools know.
        self._common = [0] * max_num_seqs

    @property
    def usage(self) -> float:
        """Share of the fullest pool that is in use."""
        return max(1 - pool.num_free / pool.num_usable for pool in self.pools)

    @property
    def max_request_tokens(self) -> int:
        """The longest that one request can become with the cache to itself."""
        longest = self.tables[0].shape[1] * self.block_size
        for pool, sight in zip(self.pools, self.sights, strict=True):
            if sight.span is None or _chunk_beside(sight.span, pool, self.block_size) < 1:
                longest = min(longest, pool.num_usable * self.block_size)
        return longest

    def max_chunk(self, wanted: int) -> int:
        """How many of the wanted tokens a lone request of any length may compute in one step."""
        for pool, sight in zip(self.pools, self.sights, strict=True):
            if sight.span is not None and pool.num_usable * self.block_size < self.max_request_tokens:
                wanted = min(wanted, _chunk_beside(sight.span, pool, self.block_size))
        return wanted

    def open(self, request: Request, reserve: int) -> bool:
        """Give the request a slot and what the prefix cache has of it, if its tokens would fit; else change nothing.

        reserve: blocks of each pool that must stay free for those who run already.
        Sets num_computed_tokens, always short of num_tokens: the last token's logits have to be computed.
        """
        if not self._free_slots:
            return False
        found, common = self._find_prefix(request)
        length = len(found[0])
        if not self._has_room(request, found, length, reserve):
            return False
        slot = request.slot = self._free_slots.pop()
        self._named[slot] = self._end[slot] = length
        self._common[slot] = common * self.block_size
        for group, blocks in enumerate(found):
            first = self.sights[group].first_block(length * self.block_size, self.block_size)
            for index in range(first, length):
                block = blocks[index]
                assert block is not None
                self.pools[group].share(block)
                self.tables[group][slot, index] = block
            self._first[slot][group] = first
        if self.snapshots is not None and length:
            self.snapshots.restore(request.block_hashes[length - 1], slot)
        request.num_computed_tokens = length * self.block_size
        self._count_prefix(request)
        return True

    def grow(self, request: Request, num_tokens: int) -> int:
        """Hold blocks for the first num_tokens tokens of the request, those out of its sight given back first.

        Returns for how many tokens there are blocks now: fewer than num_tokens where a pool ran out.
        """
        slot = request.slot
        held, end = self._end[slot], -(-num_tokens // self.block_size)
        if end > held:
            self._leave_behind(request)
            end = min(end, held + min(pool.num_free for pool in self.pools))
            for pool, table in zip(self.pools, self.tables, strict=True):
                for index in range(held, end):
                    table[slot, index] = pool.take()
            self._end[slot] = max(held, end)
        return min(num_tokens, self._end[slot] * self.block_size)

    def remember(self, request: Request) -> None:
        """Name the blocks that became full and computed, so that others find them."""
        full = request.num_computed_tokens // self.block_size
        slot = request.slot
        if self._hasher is None or not request.shares_prefix or full <= self._named[slot]:
            return
        self._hasher.extend(request.block_hashes, _root(request), request.token_ids, full)
        for group, pool in enumerate(self.pools):
            table = self.tables[group][slot]
            for index in range(max(self._named[slot], self._first[slot][group]), full):
                pool.name(int(table[index]), request.block_hashes[index])
        self._named[slot] = full
        if self.snapshots is not None and self._is_border(request):
            self.snapshots.save(slot, request.block_hashes[full - 1])

    def cut(self, request: Request, wanted: int) -> int:
        """Where a chunk that might reach `wanted` tokens should end, so that a recurrent state can be kept there."""
        if self.snapshots is None or not request.shares_prefix:
            return wanted
        # A hit leaves at least the last token to compute, so the border before that one is the last of any use.
        last = (request.num_tokens - 1) // self.block_size * self.block_size
        border = min(wanted // self.block_size * self.block_size, last)
        # What two requests have begun with, a third will: where they part, no chunk of the first need have ended.
        if request.num_computed_tokens < (common := self._common[request.slot]) < border:
            border = common
        return border if border > request.num_computed_tokens else wanted

    def close(self, request: Request) -> None:
        """Take back the slot and everything held; named blocks stay findable until they are reused."""
        slot, end = request.slot, self._end[request.slot]
        for group, pool in enumerate(self.pools):
            table = self.tables[group][slot]
            # From the end: the tail of a prefix is worth less than its beginning, so it is reused first.
            for index in range(end - 1, self._first[slot][group] - 1, -1):
                pool.give_back(int(table[index]))
            table[:end] = NULL_BLOCK
            self._first[slot][group] = 0
        self._named[slot] = self._end[slot] = 0
        self._free_slots.append(slot)
        request.slot = -1
        request.num_computed_tokens = 0

    def disown(self, request: Request) -> None:
        """Before `close`: nobody shall find what a spoiled request holds."""
        slot = request.slot
        for group, pool in enumerate(self.pools):
            for block in self.tables[group][slot, self._first[slot][group] : self._end[slot]].tolist():
                pool.unname(block)
        if self.snapshots is not None:
            for prefix in request.block_hashes:
                self.snapshots.forget(prefix)

    def _is_border(self, request: Request) -> bool:
        """Whether the state after the computed tokens is worth a copy: between blocks, and not at every few tokens."""
        computed, every = request.num_computed_tokens, self.block_size
        if computed == request.num_tokens:
            every *= -(-DECODE_INTERVAL // self.block_size)
        return computed % every == 0

    def _leave_behind(self, request: Request) -> None:
        slot = request.slot
        for group, sight in enumerate(self.sights):
            if sight.span is None:
                continue
            table, end = self.tables[group][slot], self._end[slot]
            seen = min(end, sight.first_block(request.num_computed_tokens, self.block_size))
            for index in range(self._first[slot][group], seen):
                self.pools[group].give_back(int(table[index]))
                table[index] = NULL_BLOCK
            self._first[slot][group] = max(self._first[slot][group], seen)

    def _find_prefix(self, request: Request) -> tuple[list[list[int | None]], int]:
        """Per group the cached blocks of the longest usable prefix (None where it is out of sight).

        And how many blocks it would have if only a recurrent state had been kept everywhere.
        """
        if self._hasher is None or not request.shares_prefix:
            return [[] for _ in self.pools], 0
        limit = (request.num_tokens - 1) // self.block_size
        self._hasher.extend(request.block_hashes, _root(request), request.token_ids, limit)
        hashes = request.block_hashes[:limit]
        found = [[pool.find(block_hash) for block_hash in hashes] for pool in self.pools]
        cached = [[block is not None for block in blocks] for blocks in found]
        length = common = longest_prefix(cached, self.sights, [True] * limit, self.block_size)
        if self.snapshots is not None:
            resumable = [prefix in self.snapshots for prefix in hashes]
            length = longest_prefix(cached, self.sights, resumable, self.block_size)
        return [blocks[:length] for blocks in found], common

    def _has_room(self, request: Request, found: list[list[int | None]], length: int, reserve: int) -> bool:
        """Room for all tokens of the request now known, and one more, beside the reserve."""
        end = request.num_tokens // self.block_size + 1
        for pool, sight, blocks in zip(self.pools, self.sights, found, strict=True):
            first = sight.first_block(length * self.block_size, self.block_size)
            span = min(end - first, pool.num_usable)
            if sight.span is not None:
                span = min(span, -(-sight.span // self.block_size) + 1)
            idle = sum(pool.is_idle(block) for block in blocks[first:] if block is not None)
            if span - (length - first) + reserve > pool.num_free - idle:
                return False
        return True

    def _count_prefix(self, request: Request) -> None:
        if self._hasher is not None and request.shares_prefix:
            self.prefix_queries += request.num_tokens
            self.prefix_hits += request.num_computed_tokens
        if request.num_cached_tokens is None:
            request.num_cached_tokens = min(request.num_computed_tokens, request.num_prompt_tokens)


def _chunk_beside(span: int, pool: BlockPool, block_size: int) -> int:
    """Tokens that a pool holds after the keys of a bounded sight, where both ends lie badly in their blocks."""
    return (pool.num_usable - 1) * block_size - span + 2


def _root(request: Request) -> tuple[str, str]:
    """Only requests with the same of these share anything."""
    return request.cache_salt, request.variant
