"""Names for prefixes: a chain of SHA-256 hashes over full blocks of tokens. Knows neither blocks nor requests.

Two prefixes have the same hash only if tenant salt, model identity and every token up to there are the same.
"""

from __future__ import annotations

import hashlib
from array import array


class PrefixHasher:
    """Extends hash chains for one model and block size."""

    def __init__(self, model_identity: str, block_size: int) -> None:
        self.block_size = block_size
        self._identity = model_identity.encode()
        self._roots: dict[str, bytes] = {}

    def root(self, salt: str) -> bytes:
        """The parent of a salt's first block. Lengths are hashed too, so that no two pairs run together."""
        if salt not in self._roots:
            self._roots.clear()  # one entry is what pays; many tenants must not pile up
            name = salt.encode()
            head = b"%d:%d:%d:" % (self.block_size, len(self._identity), len(name))
            self._roots[salt] = hashlib.sha256(head + self._identity + name).digest()
        return self._roots[salt]

    def extend(self, hashes: list[bytes], salt: str, token_ids: list[int], num_blocks: int) -> None:
        """Append to hashes until it names the first num_blocks blocks of token_ids (all of them full)."""
        for index in range(len(hashes), num_blocks):
            parent = hashes[-1] if hashes else self.root(salt)
            tokens = array("q", token_ids[index * self.block_size : (index + 1) * self.block_size])
            hashes.append(hashlib.sha256(parent + tokens.tobytes()).digest())


def longest_prefix(cached: list[list[bool]], windows: list[int | None], block_size: int) -> int:
    """Blocks of the longest prefix after which computing can go on.

    cached: for each group, whether it still has block i of the prefix. A full group needs every block before the
    boundary; one with a window needs those that the first token after the boundary sees.
    """
    length = len(cached[0])
    for flags, window in zip(cached, windows, strict=True):
        if window is None:
            length = min(length, flags.index(False) if False in flags else len(flags))
    runs = [_runs(flags) for flags, window in zip(cached, windows, strict=True) if window is not None]
    sights = [window for window in windows if window is not None]
    while length > 0:
        if all(
            run[length - 1] >= length - first_block_seen(length * block_size, window, block_size)
            for run, window in zip(runs, sights, strict=True)
        ):
            return length
        length -= 1
    return 0


def first_block_seen(position: int, window: int | None, block_size: int) -> int:
    """The first block that holds a key seen by the token at position (or by any later one)."""
    return 0 if window is None else max(0, position - window + 1) // block_size


def _runs(flags: list[bool]) -> list[int]:
    """For each block, how many cached blocks in a row end with it."""
    runs, run = [], 0
    for flag in flags:
        run = run + 1 if flag else 0
        runs.append(run)
    return runs
