"""Names for prefixes: a chain of SHA-256 hashes over full blocks of tokens. Knows neither blocks nor requests.

Two prefixes have the same hash only if tenant salt, the model's identity and variant, and every token up to there are
the same.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

from inferfleet.engine.sight import Sight

#: Roots are cheap to make again; a few are kept because a handful of tenants and variants is the rule.
ROOTS_KEPT = 64


class PrefixHasher:
    """Extends hash chains for one model and block size."""

    def __init__(self, model_identity: str, block_size: int) -> None:
        self.block_size = block_size
        self._identity = model_identity.encode()
        self._roots: dict[tuple[str, str], bytes] = {}

    def root(self, kin: tuple[str, str]) -> bytes:
        """The parent of the first block, for a (salt, variant). Lengths are hashed, so that no two run together."""
        if kin not in self._roots:
            if len(self._roots) >= ROOTS_KEPT:
                self._roots.clear()  # many tenants must not pile up
            parts = [self._identity, *(name.encode() for name in kin)]
            head = b":".join(b"%d" % size for size in (self.block_size, *map(len, parts)))
            self._roots[kin] = hashlib.sha256(head + b":" + b"".join(parts)).digest()
        return self._roots[kin]

    def extend(self, hashes: list[bytes], kin: tuple[str, str], token_ids: list[int], num_blocks: int) -> None:
        """Append to hashes until it names the first num_blocks blocks of token_ids (all of them full)."""
        for index in range(len(hashes), num_blocks):
            parent = hashes[-1] if hashes else self.root(kin)
            tokens = array("q", token_ids[index * self.block_size : (index + 1) * self.block_size])
            hashes.append(hashlib.sha256(parent + tokens.tobytes()).digest())


def longest_prefix(
    cached: list[list[bool]], sights: Sequence[Sight], resumable: Sequence[bool], block_size: int
) -> int:
    """Blocks of the longest prefix after which computing can go on.

    cached: for each group, whether it still has block i of the prefix. A group without bounds needs every block before
    the boundary; another one those that the first token after the boundary sees. resumable: whether the model can
    start after block i at all, whatever the groups have (a recurrent one needs its state of exactly that place).
    """
    length = len(cached[0])
    for flags, sight in zip(cached, sights, strict=True):
        if sight.span is None:
            length = min(length, flags.index(False) if False in flags else len(flags))
    bounded = [(_runs(flags), sight) for flags, sight in zip(cached, sights, strict=True) if sight.span is not None]
    while length > 0:
        if resumable[length - 1] and all(
            runs[length - 1] >= length - sight.first_block(length * block_size, block_size) for runs, sight in bounded
        ):
            return length
        length -= 1
    return 0


def _runs(flags: list[bool]) -> list[int]:
    """For each block, how many cached blocks in a row end with it."""
    runs, run = [], 0
    for flag in flags:
        run = run + 1 if flag else 0
        runs.append(run)
    return runs
