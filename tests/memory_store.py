"""A store of files in memory, which can be told to fail: it holds what the seam promises, and nothing else."""

from inferfleet.tasks.errors import LedgerUnavailable, OutputNotFound
from inferfleet.tasks.stores.store import StoredObject, check_digest


class MemoryStore:
    in_ledger = False

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        #: So many coming writes fail; of those with `keeps` the file is there and only the answer is lost.
        self.failures = 0
        self.keeps = False
        self.num_puts = 0

    def put(self, key: str, data: bytes, content_type: str) -> StoredObject:
        self.num_puts += 1
        fails = self.failures > 0
        self.failures -= fails
        if not fails or self.keeps:
            self.files[key] = data
        if fails:
            raise LedgerUnavailable("the store has no room")
        return StoredObject.of(key, data, content_type)

    def get(self, key: str, sha256: str) -> bytes:
        if key not in self.files:
            raise OutputNotFound(param="output_id")
        return check_digest(key, self.files[key], sha256)

    def forget(self, keys) -> None:
        for key in keys:
            self.files.pop(key, None)

    def presign(self, key: str, *, content_type: str, filename: str, seconds: int) -> None:
        """Nobody else can reach this memory."""
