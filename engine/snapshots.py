"""Copies of recurrent states at borders between blocks, so that a prefix found in the cache can be gone on with.

A state is overwritten at every token: unlike keys and values it is worth nothing after another one. So a copy is kept
under the hash of the prefix that it was made of, the least recently used making room. No tensors: only which slot is
copied to which.
"""

from __future__ import annotations

from inferfleet.engine.block_pool import BlockPool

#: While a request writes, its state is kept every so many tokens: a follow-up computes no more than these again.
DECODE_INTERVAL = 256


class Snapshots:
    """Slots 0 .. num_seqs-1 are those of running requests; the copies lie behind them."""

    def __init__(self, num_seqs: int, num_snapshots: int) -> None:
        self._pool = BlockPool(num_snapshots + 1)
        self._first = num_seqs - 1  # block 0 of a pool is nobody's
        self._moves: list[tuple[int, int]] = []

    def __contains__(self, prefix: bytes) -> bool:
        return self._pool.find(prefix) is not None

    def save(self, slot: int, prefix: bytes) -> None:
        """Keep what the slot holds now, the state after `prefix`."""
        if prefix in self:
            return
        block = self._pool.take()
        self._pool.name(block, prefix)
        self._pool.give_back(block)
        self._moves.append((slot, self._first + block))

    def restore(self, prefix: bytes, slot: int) -> None:
        """Give the slot the state after `prefix`, which is in here."""
        block = self._pool.find(prefix)
        assert block is not None, "the caller has found it"
        # Now the most recently used.
        self._pool.share(block)
        self._pool.give_back(block)
        self._moves.append((self._first + block, slot))

    def forget(self, prefix: bytes) -> None:
        """Nobody shall find it again."""
        if (block := self._pool.find(prefix)) is not None:
            self._pool.unname(block)

    def take_moves(self) -> list[tuple[int, int]]:
        """The copies (from slot, to slot) since the last call, to be made in this order before the next step."""
        moves, self._moves = self._moves, []
        return moves
