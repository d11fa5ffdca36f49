"""Carries pictures into the store, and tells their flights. Knows no engine.

One thread for the whole worker, so a store that is slow or away holds up no engine and no other job's words. A store
that does not answer is asked again until it does: writing a picture twice changes nothing. What waits here is bounded
by what the worker carries: see `seats.py`.
"""

import queue
import threading
import time
from collections.abc import Sequence

from inferfleet.tasks import errors, names
from inferfleet.tasks.stores import Store
from inferfleet.workers import logs
from inferfleet.workers.flight import Ending
from inferfleet.workers.image_flight import ImageFlight, PictureFile
from inferfleet.workers.publisher import Publisher

log = logs.get("outputs")

_RETRY_SECONDS = (0.05, 0.1, 0.2, 0.5, 1.0)


class OutputWriter:
    """Stores the pictures of flights that still fly."""

    def __init__(self, store: Store, publisher: Publisher) -> None:
        self._store = store
        self._publisher = publisher
        self._queue: queue.SimpleQueue[tuple[ImageFlight, PictureFile] | None] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="outputs", daemon=True)
        self._thread.start()

    @property
    def store(self) -> Store:
        return self._store

    def deliver(self, flight: ImageFlight, picture: PictureFile) -> None:
        """Store a picture soon. Returns at once."""
        self._queue.put((flight, picture))

    def discard(self, flight: ImageFlight) -> None:
        """Delete what a flight left in the store, if the store answers: else it dies by itself."""
        self._forget(flight.keys)

    def stop(self) -> None:
        """End; what is still here belongs to jobs that were handed back."""
        self._stopping.set()
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            flight, picture = item
            try:
                self._write(flight, picture)
            except Exception as error:
                # Neither a store that is away nor the job's fault; the other jobs go on.
                log.exception("output_failed", job_id=flight.job_id)
                told = error if isinstance(error, errors.OutputDamaged) else None
                failure = told or errors.EngineError("a picture could not be stored")
                flight.end(Ending.FAILED, failure.to_dict())
            del item, picture  # not kept while waiting for the next

    def _write(self, flight: ImageFlight, picture: PictureFile) -> None:
        key = names.output_id(flight.job_id, flight.fence, picture.index)
        attempt = 0
        while flight.ending is None:
            try:
                self._store.put(key, picture.data, picture.content_type)
                break
            except errors.Unavailable as error:
                if self._stopping.is_set():
                    return
                if attempt == 0:
                    log.warning("store_waits", job_id=flight.job_id, reason=error.message)
                time.sleep(_RETRY_SECONDS[min(attempt, len(_RETRY_SECONDS) - 1)])
                attempt += 1
        if flight.stored(picture):
            self._publisher.touch([flight], urgent=True)
        else:
            self._forget([key])

    def _forget(self, keys: Sequence[str]) -> None:
        try:
            self._store.forget(keys)
        except errors.Unavailable as error:
            log.warning("outputs_left_behind", keys=list(keys), reason=error.message)
