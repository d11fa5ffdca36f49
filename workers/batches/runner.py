"""The role that runs batches: takes those that nobody runs, a thread each, keeps its leases, and cleans up after files.

Several runners share the batches of a fleet; one that dies is followed by another after a lease's time.
"""

import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from inferfleet.tasks import batches, files
from inferfleet.tasks.batches import BatchRecord, Held
from inferfleet.tasks.doorbell import Doorbell
from inferfleet.tasks.errors import LedgerUnavailable, StoreUnavailable
from inferfleet.tasks.ledger import Ledger
from inferfleet.tasks.settings import Settings
from inferfleet.tasks.stores import open_store
from inferfleet.workers import logs
from inferfleet.workers.batches.orphans import OrphanSweep
from inferfleet.workers.batches.run import BatchRun, Stopped, Tools
from inferfleet.workers.cards import LIVES
from inferfleet.workers.checks import accept_redis, check_buckets, check_store

log = logs.get("batches")

CLAIM_SECONDS = 0.2
#: A batch's runner hears so often that it was cancelled or is overdue.
BEAT_SECONDS = 1.0
#: Files whose time is over and forgotten batches are looked for so often.
TIDY_SECONDS = 30.0
TIDY_BATCH = 100


class BatchRunner:
    """`run` returns once its tools are closing; batches under way are handed back then."""

    def __init__(self, tools: Tools) -> None:
        self._tools = tools
        self._name = f"batches@{socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex[:8]}"
        self._lease_ms = round(tools.settings.lease_seconds * 1000)
        self._runs: dict[tuple[str, int], BatchRun] = {}
        self._lock = threading.Lock()
        self._orphans = OrphanSweep(tools.ledger, tools.store)

    def run(self) -> None:
        """Take batches."""
        slots = self._tools.settings.batch_slots
        heartbeat = self._tools.settings.heartbeat_seconds
        deeds = ((min(BEAT_SECONDS, heartbeat), self._beat), (TIDY_SECONDS, self._tidy), (heartbeat, self._announce))
        upkeep = [threading.Thread(target=self._every, args=pair, daemon=True) for pair in deeds]
        for thread in upkeep:
            thread.start()
        with ThreadPoolExecutor(slots, thread_name_prefix="batch") as threads:
            while not self._tools.closing.is_set():
                batch = self._claim() if len(self._runs) < slots else None
                if batch is None:
                    self._tools.closing.wait(CLAIM_SECONDS)
                    continue
                run = BatchRun(self._tools, batch, Held(batch.status, overdue=False))
                with self._lock:
                    self._runs[batch.id, batch.fence] = run
                threads.submit(self._carry, run)
        for thread in upkeep:
            thread.join()
        self._leave()

    def _announce(self) -> None:
        """Say that this runner lives."""
        info = {"host": socket.gethostname(), "pid": os.getpid()}
        self._tools.ledger.put_role("batches", self._name, info, LIVES * self._tools.settings.heartbeat_seconds)

    def _leave(self) -> None:
        try:
            self._tools.ledger.put_role("batches", self._name, {}, 0)
        except LedgerUnavailable as error:
            log.warning("left_without_a_word", reason=error.message)

    def _claim(self) -> BatchRecord | None:
        try:
            return self._tools.ledger.run(batches.claim(self._name, self._lease_ms))
        except LedgerUnavailable as error:
            log.warning("ledger_unavailable", reason=error.message)
            return None

    def _carry(self, run: BatchRun) -> None:
        batch = run.batch
        started = time.monotonic()
        with logs.bound(batch_id=batch.id):
            try:
                status = run.run()
                log.info("batch_ended", status=status, seconds=round(time.monotonic() - started, 3))
            except (Stopped, LedgerUnavailable, StoreUnavailable):
                log.info("batch_handed_back", lost=run.lost.is_set())
                self._give_back(run)
            except Exception:
                # Another runner, or this one after the lease, tries again: nothing that was written is lost.
                log.exception("batch_broke")
            finally:
                with self._lock:
                    self._runs.pop((batch.id, batch.fence), None)

    def _give_back(self, run: BatchRun) -> None:
        try:
            if not run.lost.is_set():
                self._tools.ledger.run(batches.beat(run.batch.id, run.batch.fence, 0))
        except LedgerUnavailable:
            return  # its lease ends by itself

    def _every(self, seconds: float, deed: Callable[[], None]) -> None:
        while not self._tools.closing.is_set():
            try:
                deed()
            except (LedgerUnavailable, StoreUnavailable) as error:
                log.warning(error.code, reason=error.message)
            except Exception:
                log.exception("upkeep_broke")
            self._tools.closing.wait(seconds)

    def _beat(self) -> None:
        """Keep the leases, and hear what became of the batches meanwhile."""
        with self._lock:
            runs = list(self._runs.values())
        for run in runs:
            held = self._tools.ledger.run(batches.beat(run.batch.id, run.batch.fence, self._lease_ms))
            if held is None:
                run.lost.set()
            else:
                run.held = held

    def _tidy(self) -> None:
        """Forget files and batches whose time is over, and objects in the store that nothing names."""
        count, keys = self._tools.ledger.run(files.sweep_files(TIDY_BATCH))
        if keys and not self._tools.store.in_ledger:
            self._tools.store.forget(keys)
        forgotten = self._tools.ledger.run(batches.sweep(TIDY_BATCH))
        orphans = self._orphans.round()
        if count or forgotten or orphans:
            log.info("tidied", files=count, batches=forgotten, orphans=orphans)


def run_batches(settings: Settings) -> None:
    """The role as a program, until a signal. Raises RedisMisconfigured, LedgerUnavailable, StoreUnavailable."""
    ledger = Ledger.from_url(settings.redis_url, settings.namespace)
    accept_redis(ledger, settings)
    check_store(settings, ledger)
    check_buckets(settings)
    store = open_store(settings, ledger)
    doorbell = Doorbell(settings.redis_url, settings.namespace)
    closing = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: closing.set())
    log.info("batches_ready", store=settings.result_store)
    try:
        BatchRunner(Tools(settings, ledger, store, doorbell, closing)).run()
    finally:
        doorbell.close()
        ledger.close()
