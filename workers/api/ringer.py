"""Rings Celery for new jobs without holding up the event loop. A lost ring costs a second, never a job."""

import threading
from collections import Counter
from collections.abc import Callable
from queue import SimpleQueue

from inferfleet.workers import logs

log = logs.get("api")

#: Puts `times` turns on a model's queue; False = the broker could not be told.
Ring = Callable[[str, int], object]


class Ringer:
    """One thread; rings that pile up while the broker is slow go out together."""

    def __init__(self, ring: Ring) -> None:
        self._ring = ring
        self._waiting: SimpleQueue[str | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="ringer", daemon=True)
        self._thread.start()

    def ring(self, model: str) -> None:
        """Ask that somebody carry one job of a model. Never waits, never fails."""
        self._waiting.put(model)

    def close(self) -> None:
        """Sends what was asked for and ends."""
        self._waiting.put(None)
        self._thread.join(timeout=5)

    def _run(self) -> None:
        self._ring_safely("", 0)  # loads the broker's client now, not while the first job waits for its worker
        while True:
            asked = [self._waiting.get()]
            while not self._waiting.empty():
                asked.append(self._waiting.get())
            for model, times in Counter(model for model in asked if model is not None).items():
                self._ring_safely(model, times)
            if None in asked:
                return

    def _ring_safely(self, model: str, times: int) -> None:
        try:
            if self._ring(model, times) is False:
                log.warning("ring_failed", model=model, times=times)
        except Exception as error:  # whatever the broker's client raises: the sweeper rings again within a second
            log.warning("ring_failed", model=model, times=times, error=type(error).__name__)
