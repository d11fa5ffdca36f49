"""Keeps the messages of runs in the ledger from the moment they leave the broker until their results are stored.

A run whose process died is given back to the broker when its lease ends; a message with an ETA lies in the ledger until
its time comes, and in no process's memory.
"""

import threading
import time
from typing import Any

from inferfleet.tasks.errors import LedgerUnavailable
from inferfleet.tasks.ledger import Ledger
from inferfleet.workers import logs
from inferfleet.workers.patience import until_answered

log = logs.get("run")

#: Messages given back in one call of the script.
BATCH = 100


class Keeper:
    """One thread a process that carries runs. Its methods may be called from any thread."""

    def __init__(
        self,
        ledger: Ledger,
        closing: threading.Event,
        *,
        lease_seconds: float,
        heartbeat_seconds: float,
        sweep_seconds: float,
    ) -> None:
        self._ledger = ledger
        self._closing = closing
        self._lease_ms = round(lease_seconds * 1000)
        self._heartbeat_seconds = heartbeat_seconds
        self._sweep_seconds = sweep_seconds
        self._held: set[str] = set()
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="keeper", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join()

    def keep(self, task_id: str, queue: str, message: str, eta_ms: int | None) -> bool:
        """Keep a message that was just taken from the broker's list `queue`; False when its ETA has not come yet.

        Raises LedgerUnavailable once this process closes.
        """
        with self._lock:
            self._held.add(task_id)
        now = self._answer(self._ledger.keep_run, task_id, queue, message, eta_ms=eta_ms, lease_ms=self._lease_ms)
        if not now:
            self._let_go(task_id)
        return bool(now)

    def drop(self, task_id: str) -> None:
        """The result is stored."""
        self._end(self._ledger.drop_run, task_id)

    def give_back(self, task_id: str) -> None:
        """Another process shall go on with it."""
        self._end(self._ledger.return_run, task_id)

    def hasten(self, task_id: str) -> None:
        """Do not wait for its ETA any longer."""
        self._ledger.return_run(task_id, if_waiting=True)

    def round(self) -> None:
        """Give back what became due, or whose process is gone."""
        due, lost = self._ledger.sweep_runs(BATCH)
        if lost:
            log.warning("runs_given_up", count=lost)
        if due:
            log.info("runs_due", count=due)

    def _end(self, call: Any, task_id: str) -> None:
        """Where the ledger is away at the end of this process the lease ends too, and the run is repeated elsewhere:
        it finds its job's answer."""
        try:
            self._answer(call, task_id)
        except LedgerUnavailable as error:
            log.warning("run_kept", reason=error.message)
        finally:
            self._let_go(task_id)

    def _answer(self, call: Any, *args: Any, **kwargs: Any) -> Any:
        return until_answered(lambda: call(*args, **kwargs), self._closing)

    def _let_go(self, task_id: str) -> None:
        with self._lock:
            self._held.discard(task_id)

    def _run(self) -> None:
        next_beat = 0.0
        while not self._stopping.wait(min(self._sweep_seconds, self._heartbeat_seconds)):
            try:
                if time.monotonic() >= next_beat:
                    next_beat = time.monotonic() + self._heartbeat_seconds
                    self._beat()
                self.round()
            except LedgerUnavailable as error:
                log.warning("round_skipped", reason=error.message)
            except Exception:
                # Without this thread every run here would be given up in the middle.
                log.exception("keeper_stumbled")

    def _beat(self) -> None:
        with self._lock:
            held = list(self._held)
        if held:
            self._ledger.beat_runs(held, self._lease_ms)
