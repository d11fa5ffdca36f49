"""Keeps the ledger moving: takes back jobs of lost workers, expires, deletes, and rings for jobs that nobody rang for.

Runs in every worker; several at once are harmless, because the ledger's scripts are idempotent and a turn too many
finds nothing to do.
"""

import threading
from collections import Counter
from collections.abc import Callable

from inferfleet.tasks import names
from inferfleet.tasks.call import Call
from inferfleet.tasks.doorbell import Doorbell
from inferfleet.tasks.errors import LedgerUnavailable
from inferfleet.tasks.ledger import Ledger
from inferfleet.tasks.records import Lost
from inferfleet.workers import logs
from inferfleet.workers.neighbours import Neighbours

log = logs.get("janitor")

#: Jobs taken back, expired or deleted in one call of a script, so that no script holds Redis for long.
BATCH = 100
COMPARE = (
    "another Redis has taken over: what the old one had accepted last may be lost; "
    "`inferfleet jobs lookup` tells producers which of their idempotency keys are not known"
)
#: Rings for one model in one round; the next round comes a second later.
MAX_RINGS = 500


class Janitor:
    """One thread a worker. `on_reaped` is told how many jobs ended how; `upkeep` is done after every round."""

    def __init__(
        self,
        ledger: Ledger,
        doorbell: Doorbell,
        *,
        sweep_seconds: float,
        lease_seconds: float,
        max_deaths: int,
        result_ttl_seconds: float,
        dead_letter_ttl_seconds: float,
        neighbours: Neighbours,
        on_reaped: Callable[[Counter[str]], None],
        upkeep: Callable[[], None],
    ) -> None:
        self._ledger = ledger
        self._doorbell = doorbell
        self._sweep_seconds = sweep_seconds
        self._lease_ms = round(lease_seconds * 1000)
        # A lease is worth two beats at least, so a shorter silence ends none; and one's own sweeps are no silence.
        self._silence_ms = round(max(lease_seconds / 2, 3 * sweep_seconds) * 1000)
        self._max_deaths = max_deaths
        self._result_ttl_ms = round(result_ttl_seconds * 1000)
        self._dead_ttl_ms = round(dead_letter_ttl_seconds * 1000)
        self._neighbours = neighbours
        self._on_reaped = on_reaped
        self._upkeep = upkeep
        self._stopping = False
        self._nudged = threading.Event()
        self._thread = threading.Thread(target=self._run, name="janitor", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def nudge(self) -> None:
        """Make a round now, not after sweep_seconds."""
        self._nudged.set()

    def stop(self) -> None:
        self._stopping = True
        self._nudged.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopping:
            self._nudged.wait(self._sweep_seconds)
            self._nudged.clear()
            try:
                self.round()
                self._upkeep()
            except LedgerUnavailable as error:
                log.warning("round_skipped", reason=error.message)
            except Exception:
                log.exception("round_broke")

    def round(self) -> None:
        """Look at the server and at neighbours, reap, sweep, ring."""
        if self._ledger.note_server():
            log.error("redis_failed_over", advice=COMPARE)
        self._bury_neighbours()
        self._reap()
        swept = self._ledger.sweep(BATCH, result_ttl_ms=self._result_ttl_ms, dead_ttl_ms=self._dead_ttl_ms)
        if swept.expired or swept.deleted:
            log.info("swept", expired=len(swept.expired), deleted=swept.deleted)
        for model, waiting in swept.ring.items():
            missing = min(waiting, MAX_RINGS) - self._num_rung(model)
            if missing > 0:
                self._doorbell.ring(model, missing)

    def _num_rung(self, model: str) -> int:
        """Turns that nobody took yet. The broker is the ledger's Redis, and kombu keeps a queue in a list."""
        return self._ledger.run(Call("", ("LLEN", names.turn_queue(model, self._ledger.namespace)), int))

    def _reap(self) -> None:
        while reaped := self._ledger.reap(
            BATCH, self._max_deaths, silence_ms=self._silence_ms, lease_ms=self._lease_ms
        ):
            self._tell(reaped)
            if len(reaped) < BATCH:
                return

    def _bury_neighbours(self) -> None:
        for worker in self._neighbours.gone():
            lost = self._ledger.bury(worker, self._max_deaths)
            self._neighbours.forget(worker)
            log.warning("worker_gone", worker=worker, jobs=len(lost))
            self._tell(lost)

    def _tell(self, lost: list[tuple[str, Lost]]) -> None:
        for job_id, how in lost:
            log.warning("job_taken_back", job_id=job_id, how=how)
        self._on_reaped(Counter(how for _, how in lost))
