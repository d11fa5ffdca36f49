"""Files in the ledger's own Redis, one string each. Two carriers, sync and async, as the ledger has.

A file that nobody asks the ledger to keep dies by itself: what a lost worker wrote needs no one to clean up after it.
"""

from collections.abc import Sequence

from inferfleet.tasks.call import Call, Key, Steps
from inferfleet.tasks.errors import OutputNotFound
from inferfleet.tasks.ledger import AsyncLedger, Ledger
from inferfleet.tasks.stores.store import StoredObject, check_digest

#: A file waits this much longer for its job to end than the job's result is kept then.
MARGIN_SECONDS = 3600.0


def place(key: str) -> Key:
    """The legend of lua/records.lua names it."""
    return Key(f"output:{key}")


def put(key: str, data: bytes, content_type: str, ttl_ms: int) -> Steps[StoredObject]:
    """Write a file, and read it back: a length and a digest that Redis holds are worth more than a promise."""
    stored = StoredObject.of(key, data, content_type)
    yield Call("", ("SET", place(key), data, "PX", ttl_ms), lambda answer: None)
    yield from get(key, stored.sha256)
    return stored


def get(key: str, sha256: str) -> Steps[bytes]:
    data = yield Call("", ("GET", place(key)), lambda answer: answer)
    if data is None:
        raise OutputNotFound(param="output_id")
    return check_digest(key, data, sha256)


def forget(keys: Sequence[str]) -> Steps[None]:
    if keys:
        yield Call("", ("UNLINK", *map(place, keys)), lambda answer: None)


class RedisStore:
    """The store for threads."""

    in_ledger = True

    def __init__(self, ledger: Ledger, ttl_seconds: float) -> None:
        """ttl_seconds: how long the result of a job is kept."""
        self._ledger = ledger
        self._ttl_ms = round(1000 * (ttl_seconds + MARGIN_SECONDS))

    def put(self, key: str, data: bytes, content_type: str) -> StoredObject:
        return self._ledger.run(put(key, data, content_type, self._ttl_ms))

    def get(self, key: str, sha256: str) -> bytes:
        return self._ledger.run(get(key, sha256))

    def forget(self, keys: Sequence[str]) -> None:
        self._ledger.run(forget(keys))

    def presign(self, key: str, *, content_type: str, filename: str, seconds: int) -> None:
        """Nobody but the fleet may ask its Redis."""


class AsyncRedisStore:
    """The store for one event loop."""

    in_ledger = True

    def __init__(self, ledger: AsyncLedger, ttl_seconds: float) -> None:
        """ttl_seconds: how long the result of a job is kept."""
        self._ledger = ledger
        self._ttl_ms = round(1000 * (ttl_seconds + MARGIN_SECONDS))

    async def put(self, key: str, data: bytes, content_type: str) -> StoredObject:
        return await self._ledger.run(put(key, data, content_type, self._ttl_ms))

    async def get(self, key: str, sha256: str) -> bytes:
        return await self._ledger.run(get(key, sha256))

    async def forget(self, keys: Sequence[str]) -> None:
        await self._ledger.run(forget(keys))

    def presign(self, key: str, *, content_type: str, filename: str, seconds: int) -> None:
        """As RedisStore.presign."""
