"""Blocks of one kind: numbers that are taken, shared, given back, and found again by the hash of what they hold."""

from __future__ import annotations

from collections import OrderedDict

NULL_BLOCK = 0


class BlockPool:
    """The blocks of one pool: free, cached (free but still named by a hash) or in use (counted)."""

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 2:
            raise ValueError(f"a pool needs the null block and at least one more, not {num_blocks}")
        self.num_usable = num_blocks - 1
        self._blank = list(range(num_blocks - 1, NULL_BLOCK, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._owners = [0] * num_blocks
        self._hash_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        return len(self._blank) + len(self._cached)

    def take(self) -> int:
        """A block for one owner; its old contents are forgotten. The caller has seen that one is free."""
        if self._blank:
            block = self._blank.pop()
        else:
            block, _ = self._cached.popitem(last=False)
            self.unname(block)
        self._owners[block] = 1
        return block

    def share(self, block: int) -> None:
        """One owner more, of a block found by its hash."""
        if self._owners[block] == 0:
            del self._cached[block]
        self._owners[block] += 1

    def give_back(self, block: int) -> None:
        """One owner less."""
        self._owners[block] -= 1
        if self._owners[block] == 0:
            if self._hash_of[block] is None:
                self._blank.append(block)
            else:
                self._cached[block] = None

    def find(self, block_hash: bytes) -> int | None:
        return self._block_of.get(block_hash)

    def is_idle(self, block: int) -> bool:
        """True for a block without an owner."""
        return self._owners[block] == 0

    def name(self, block: int, block_hash: bytes) -> None:
        """Let others find the block; where two requests computed the same, the first block keeps the name."""
        if self._hash_of[block] is None and block_hash not in self._block_of:
            self._hash_of[block] = block_hash
            self._block_of[block_hash] = block

    def unname(self, block: int) -> None:
        """Nobody shall find the block again."""
        block_hash = self._hash_of[block]
        if block_hash is not None:
            self._hash_of[block] = None
            del self._block_of[block_hash]
