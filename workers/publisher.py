"""Carries what flights say into the ledger's event log. Knows no engine.

One thread for the whole worker. All that a step said goes out in one pipeline; flushes are at least FLUSH_SECONDS
apart, and what is said between two of them is merged. A flight's first words and its last do not wait for that.
A pipeline whose reply was lost is sent again with the same tokens until Redis answers.
"""

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from redis import exceptions

from inferfleet.tasks import calls, errors
from inferfleet.tasks.call import Call
from inferfleet.tasks.ledger import Ledger, as_unavailable
from inferfleet.workers import logs
from inferfleet.workers.flight import Ending, Flight, Outgoing

FLUSH_SECONDS = 0.02
_RETRY_SECONDS = (0.05, 0.1, 0.2, 0.5, 1.0)

log = logs.get("publisher")

#: Publishes for several flights in one round trip; answers a word for each: ok | cancel | stale | full.
Publish = Callable[[Sequence[tuple[Flight, Outgoing]]], Sequence[str]]


class Publisher:
    """Publishes for flights that were marked with `touch`, and ends those that are settled."""

    def __init__(self, publish: Publish, cancel: Callable[[Flight], None]) -> None:
        self._publish = publish
        self._cancel = cancel
        self._changed = threading.Condition()
        self._touched: dict[Flight, None] = {}
        self._urgent = False
        self._stopping = False
        self._flushed_at = 0.0
        self._thread = threading.Thread(target=self._run, name="publisher", daemon=True)
        self._thread.start()

    def touch(self, flights: Sequence[Flight], *, urgent: bool) -> None:
        """These flights have something to publish, or are done; `urgent` = now, not with the next flush."""
        with self._changed:
            self._touched.update(dict.fromkeys(flights))
            self._urgent = self._urgent or urgent
            self._changed.notify()

    def stop(self) -> None:
        """Flush what is there, if Redis answers, and end."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while flights := self._next():
            going = [flight for flight in flights if flight.ending is None]
            try:
                self._flush(going)
            except Exception:
                # A fault of ours or of Redis that repeating does not mend. One by one, the healthy ones get through:
                # what was sent before is sent with the same token and lands once.
                log.exception("publish_broke", flights=len(going))
                for flight in going:
                    self._flush_alone(flight)

    def _flush_alone(self, flight: Flight) -> None:
        """Fails no more than this one."""
        try:
            self._flush([flight] if flight.ending is None else [])
        except Exception:
            log.exception("publish_failed", job_id=flight.job_id)
            flight.end(Ending.FAILED, errors.EngineError("the answer could not be published").to_dict())

    def _next(self) -> list[Flight]:
        """The flights of the next flush; none = stop."""
        with self._changed:
            self._changed.wait_for(lambda: self._touched or self._stopping)
            since = time.monotonic() - self._flushed_at
            self._changed.wait_for(lambda: self._urgent or self._stopping, FLUSH_SECONDS - since)
            flights = list(self._touched)
            self._touched.clear()
            self._urgent = False
            self._flushed_at = time.monotonic()
            return flights

    def _flush(self, flights: Sequence[Flight]) -> None:
        batch = [(flight, outgoing) for flight in flights if (outgoing := flight.outgoing())]
        words = self._send(batch) if batch else ()
        for (flight, _), word in zip(batch, words, strict=True):
            self._heed(flight, word)
        for flight in flights:
            if flight.settled:
                flight.end(Ending.FINISHED)
        # Said while this flush was under way, after its batch was cut: these flights are not settled, go again.
        unsettled = [f for f in flights if f.usage is not None and f.ending is None and f.has_news]
        if unsettled:
            self.touch(unsettled, urgent=True)

    def _send(self, batch: Sequence[tuple[Flight, Outgoing]]) -> Sequence[str]:
        attempt = 0
        while True:
            try:
                return self._publish(batch)
            except errors.LedgerUnavailable as error:
                if self._stopping:
                    return ["stale"] * len(batch)
                if attempt == 0:
                    log.warning("publish_waits", reason=error.message, flights=len(batch))
                time.sleep(_RETRY_SECONDS[min(attempt, len(_RETRY_SECONDS) - 1)])
                attempt += 1

    def _heed(self, flight: Flight, word: str) -> None:
        if word == "stale":
            flight.end(Ending.STALE)
        elif word == "full":
            flight.end(Ending.FAILED, errors.EventLogFull().to_dict())
        else:
            flight.published()
        if word != "ok":
            self._cancel(flight)


def publish_all(ledger: Ledger, batch: Sequence[tuple[Flight, Outgoing]]) -> list[str]:
    """One pipeline for the whole batch; a word for each. Raises LedgerUnavailable; may then be repeated."""
    said = [
        calls.publish(flight.job_id, flight.fence, out.events, out.token, behind=out.behind) for flight, out in batch
    ]
    pipeline = ledger.redis.pipeline(transaction=False)
    for call in said:
        pipeline.execute_command(*ledger.command(call))
    with as_unavailable():
        answers = pipeline.execute(raise_on_error=False)
    return [_word(ledger, call, answer) for call, answer in zip(said, answers, strict=True)]


def _word(ledger: Ledger, call: Call[Any], answer: object) -> str:
    try:
        if isinstance(answer, exceptions.NoScriptError):
            return str(ledger.run(call))
        with as_unavailable():
            if isinstance(answer, Exception):
                raise answer
        return str(call.parse(answer))
    except errors.EventLogFull:
        return "full"
