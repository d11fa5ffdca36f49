"""What a store of files is asked for. Knows no Redis, no job and no picture.

A key is written by one run of one job (`names.output_id`), so it is never written with two contents, and writing it
again after a lost reply changes nothing. What is read is compared with the digest that its job's record holds: a file
that was damaged or exchanged is told, not given.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from inferfleet.tasks.errors import OutputDamaged


@dataclass(frozen=True)
class StoredObject:
    """A file in a store."""

    key: str
    content_type: str
    size_bytes: int
    #: Hexadecimal.
    sha256: str

    @classmethod
    def of(cls, key: str, data: bytes, content_type: str) -> "StoredObject":
        return cls(key, content_type, len(data), hashlib.sha256(data).hexdigest())


class Store(Protocol):
    """A store for threads. Unavailable (a kind of it) where it does not answer or has no room; ask it again then."""

    #: Whether files lie in the ledger's Redis, whose `complete` then keeps them as long as their job.
    in_ledger: bool

    def put(self, key: str, data: bytes, content_type: str) -> StoredObject:
        """Keep a file for the store's time to live. Raises OutputDamaged if it does not read back as it was."""

    def get(self, key: str, sha256: str) -> bytes:
        """A file. Raises OutputNotFound, or OutputDamaged where its digest is another."""

    def forget(self, keys: Sequence[str]) -> None:
        """Delete files. One that is not there is no error."""

    def presign(self, key: str, *, content_type: str, filename: str, seconds: int) -> str | None:
        """A link to a file, good for so long, that needs no key of ours; None where only the API can give it."""


class AsyncStore(Protocol):
    """The same for one event loop."""

    in_ledger: bool

    async def put(self, key: str, data: bytes, content_type: str) -> StoredObject:
        """As Store.put."""

    async def get(self, key: str, sha256: str) -> bytes:
        """As Store.get."""

    async def forget(self, keys: Sequence[str]) -> None:
        """As Store.forget."""

    def presign(self, key: str, *, content_type: str, filename: str, seconds: int) -> str | None:
        """As Store.presign."""


def check_digest(key: str, data: bytes, sha256: str) -> bytes:
    """The data, if it is what was meant. Raises OutputDamaged."""
    if hashlib.sha256(data).hexdigest() != sha256:
        raise OutputDamaged(f"the file {key} is not what was written", param="output_id")
    return data
