"""Copies a batch's input out of a bucket, into a file of the fleet, and its output and error file into one.

The fleet's own files stay what counts: after the copy nobody asks the bucket again what the input was, and a bucket
that takes no files keeps no batch from ending.
"""

import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Protocol, TypeVar

from inferfleet.tasks import batches, files
from inferfleet.tasks.batches import BatchRecord, Held
from inferfleet.tasks.call import Call
from inferfleet.tasks.errors import (
    FileNotFound,
    ObjectChanged,
    OutputNotFound,
    StoreMisconfigured,
    StoreUnavailable,
)
from inferfleet.tasks.files import PART_BYTES, Kind, Part
from inferfleet.tasks.s3_url import S3Url, lies_in, parse_object, parse_prefix
from inferfleet.tasks.settings import Settings
from inferfleet.tasks.shelf import selected
from inferfleet.tasks.stores import Bucket, Store
from inferfleet.workers.batches.plan import Wrong

T = TypeVar("T")

CONTENT_TYPE = "application/jsonl"
#: A bucket that does not take the files is asked until the window ends, and at least so long.
PATIENCE_SECONDS = 3600.0
KINDS: tuple[Kind, ...] = ("output", "error")


class RunContext(Protocol):
    """What a run of a batch lends."""

    batch: BatchRecord
    held: Held

    def say(self, call: Call[T]) -> T:
        """The ledger's answer, however long it takes."""

    def patiently(self, call: Callable[[], T]) -> T:
        """The answer of a call that is made again while ledger or store are away."""

    def check(self) -> None:
        """Raises where the run should stop."""


class Exchange:
    """Of one batch."""

    def __init__(self, settings: Settings, store: Store, run: RunContext) -> None:
        self._settings = settings
        self._store = store
        self._run = run
        self._batch = run.batch

    # In ----------------------------------------------------------------------------------------------------------

    def fetch(self) -> None:
        """Copy the input, unless that was done before. Raises Wrong where the batch cannot be run."""
        batch, say = self._batch, self._run.say
        try:
            say(files.get_file(batch.input_file_id))
        except FileNotFound:
            pass
        else:
            return
        url = parse_object(self._allowed(batch.input_url or "", "input_file_id"))
        bucket = Bucket(self._settings.s3)
        size, etag = self._ask(partial(bucket.look, url))
        if size > self._settings.max_file_bytes:
            limit = self._settings.max_file_bytes
            raise Wrong(
                "input_too_large", f"the object has {size} bytes, a batch's input at most {limit}", "input_file_id"
            )
        for n, start in enumerate(range(0, size, PART_BYTES)):
            data = self._ask(partial(bucket.read, url, etag, start, min(PART_BYTES, size - start)))
            key = files.part_key(batch.input_file_id, batch.fence, n)
            stored = self._run.patiently(partial(self._store.put, key, data, CONTENT_TYPE))
            self._run.check()
            part = Part(key, stored.size_bytes, stored.sha256)
            say(files.add_part(batch.input_file_id, n, part, in_ledger=self._store.in_ledger))
        say(files.close_file(batch.input_file_id, size, files.DEFAULT_SECONDS, body_hash=etag))

    def _allowed(self, url: str, param: str) -> str:
        """The settings may have changed since the batch was accepted."""
        if not lies_in(url, self._settings.batch_buckets.get(self._batch.tenant, [])):
            raise Wrong("url_not_allowed", "batch_buckets does not give this place to the tenant", param)
        return url

    def _ask(self, call: Callable[[], T]) -> T:
        """Ask the bucket for the input until the window ends."""

        def attempt() -> T:
            self._run.check()
            if self._run.held.status == "cancelling":
                raise Wrong("batch_cancelled", "the batch was cancelled before its input was read", None)
            try:
                return call()
            except OutputNotFound:
                raise Wrong("input_not_found", "there is no object at this url", "input_file_id") from None
            except ObjectChanged:
                raise Wrong("input_changed", "the object was exchanged while it was read", "input_file_id") from None
            except StoreMisconfigured as error:
                raise Wrong("input_not_readable", error.message, "input_file_id") from None
            except StoreUnavailable as error:
                if time.time() >= self._batch.expires_ms / 1000:
                    raise Wrong("input_not_readable", error.message, "input_file_id") from None
                raise

        return self._run.patiently(attempt)

    # Out ---------------------------------------------------------------------------------------------------------

    def deliver(self) -> dict[str, str]:
        """Copy the files of a batch whose lines have all ended: where they lie now, or why they do not.

        Done again by another runner it writes the same bytes to the same places.
        """
        prefix, about = self._batch.output_url_prefix or "", {}
        record = self._run.say(batches.get(self._batch.id))
        sizes = {"output": record.output_bytes, "error": record.error_bytes}
        give_up = max(self._batch.expires_ms / 1000, time.time() + PATIENCE_SECONDS)
        try:
            place = parse_prefix(self._allowed(prefix, "output_url_prefix"))
            bucket = Bucket(self._settings.s3)
            for kind in KINDS:
                if sizes[kind]:
                    url = S3Url(place.bucket, f"{place.key}{record.id}_{kind}.jsonl")
                    self._copy(bucket, url, kind, sizes[kind], give_up)
                    about[f"{kind}_url"] = str(url)
        except Wrong as wrong:
            about["output_problem"] = str(wrong)
        return about

    def _copy(self, bucket: Bucket, url: S3Url, kind: Kind, size: int, give_up: float) -> None:
        if size > Bucket.MAX_WRITE_BYTES:
            raise Wrong("output_too_large", f"the {kind} file has {size} bytes; S3 takes no more than 5 GiB", None)
        with tempfile.TemporaryFile(prefix="inferfleet-batch-") as file:
            for part in self._run.say(files.parts_of(self._batch.id)):
                self._run.check()
                file.write(selected(self._run.patiently(partial(self._store.get, part.key, part.sha256)), kind))

            def attempt() -> None:
                self._run.check()
                try:
                    bucket.write(url, file, CONTENT_TYPE)
                except StoreUnavailable as error:
                    if isinstance(error, StoreMisconfigured) or time.time() >= give_up:
                        raise Wrong("output_not_written", error.message, None) from None
                    raise

            self._run.patiently(attempt)
