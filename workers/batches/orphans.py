"""Deletes what lies in a bucket and belongs to nobody: files of runs that lost their job, of jobs that are gone, of
uploads that broke off. A store in the ledger's Redis needs none of it, since what nobody keeps dies there by itself.
"""

from datetime import UTC, datetime, timedelta

from inferfleet.tasks import files
from inferfleet.tasks.ledger import Ledger
from inferfleet.tasks.stores import S3Store, Store

#: Objects that one round looks at.
PAGE = 1000
#: A file lies in the store before the ledger knows of it. Longer than any write and its repeats take.
GRACE = timedelta(hours=1)


class OrphanSweep:
    """Walks through the bucket, a page a round, and begins again at its end."""

    def __init__(self, ledger: Ledger, store: Store, grace: timedelta = GRACE) -> None:
        self._ledger = ledger
        self._store = store
        self._grace = grace
        self._after = ""

    def round(self) -> int:
        """Look at one page; gives the number of objects that it deleted."""
        if not isinstance(self._store, S3Store):
            return 0
        found = self._store.scan(self._after, PAGE)
        self._after = found[-1].key if len(found) == PAGE else ""
        oldest = datetime.now(UTC) - self._grace
        old = [item.key for item in found if item.modified < oldest]
        needed = self._ledger.run(files.needed(old)) if old else []
        # What this fleet cannot have written is not its to delete: another may share the bucket.
        orphans = [key for key, keep in zip(old, needed, strict=True) if not keep and files.is_ours(key)]
        self._store.forget(orphans)
        return len(orphans)
