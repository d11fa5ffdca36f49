"""Renews the leases of the jobs whose engine moves, and ends an engine that stands still. Reaps nothing itself.

A lease says "somebody gets on with this job", not "a process lives": a stopped or hung engine loses its jobs to other
workers, and is killed after stall_seconds so that a fresh one can take its place. Which member of a batch it hangs on
nobody knows, so just before their leases lapse they are handed back, to run alone: only the culprit collects deaths.
"""

import threading
import time
from collections.abc import Callable, Iterable

from inferfleet.tasks.errors import LedgerUnavailable
from inferfleet.tasks.ledger import Ledger
from inferfleet.workers import logs
from inferfleet.workers.flight import Ending, Flight
from inferfleet.workers.resident import Resident

log = logs.get("heart")

#: How often it looks for engines that stand still.
_TICK_SECONDS = 0.5


class Heart:
    """One thread a worker."""

    def __init__(
        self,
        ledger: Ledger,
        worker: str,
        residents: Callable[[], Iterable[Resident]],
        *,
        heartbeat_seconds: float,
        lease_seconds: float,
        stall_seconds: float,
    ) -> None:
        self._ledger = ledger
        self._worker = worker
        self._residents = residents
        self._heartbeat_seconds = heartbeat_seconds
        self._lease_ms = round(lease_seconds * 1000)
        self._stall_seconds = stall_seconds
        # The last beat was at most a heartbeat before the last step: no lease lapses before this.
        self._doubt_seconds = max(lease_seconds - heartbeat_seconds - 2 * _TICK_SECONDS, lease_seconds / 4)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heart", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Beat no more."""
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        next_beat = last_tick = time.monotonic()
        while not self._stopping.wait(min(_TICK_SECONDS, self._heartbeat_seconds)):
            # After a pause of the whole worker (SIGSTOP, a suspended machine) the engines' words lie unread in their
            # sockets: it was not they that stood still.
            paused = time.monotonic() - last_tick > 4 * _TICK_SECONDS
            last_tick = time.monotonic()
            try:
                for resident in () if paused else self._residents():
                    self._check(resident)
                if time.monotonic() >= next_beat:
                    next_beat = time.monotonic() + self._heartbeat_seconds
                    self._beat_all()
            except Exception:
                # Whatever it is: without a heart every job of this worker would be lost.
                log.exception("heart_stumbled")

    def _check(self, resident: Resident) -> None:
        still = resident.still_for()
        if still > self._stall_seconds:
            log.error("engine_stalled", model=resident.model, seconds=round(still, 1))
            resident.kill()
        elif still > self._doubt_seconds:
            resident.abandon()

    def _beat_all(self) -> None:
        try:
            for resident in self._residents():
                self._beat(resident, moved=resident.take_moved())
        except LedgerUnavailable as error:
            # Not repeated here: the next beat comes soon, and a lease outlives two lost beats.
            log.warning("beat_failed", reason=error.message)

    def _beat(self, resident: Resident, *, moved: bool) -> None:
        """All its jobs if the engine moved; else those that wait for this worker, which is alive."""
        flights = {flight.job_id: flight for flight in resident.flights() if moved or flight.in_our_hands}
        if not flights:
            return
        jobs = [(flight.job_id, flight.fence) for flight in flights.values()]
        words = self._ledger.beat(self._worker, jobs, self._lease_ms)
        for job_id, word in words.items():
            if word != "ok":
                self._heed(resident, flights[job_id], word)

    def _heed(self, resident: Resident, flight: Flight, word: str) -> None:
        if word == "cancel":
            resident.cancel(flight)
        else:
            resident.let_go(flight, Ending.STALE)
