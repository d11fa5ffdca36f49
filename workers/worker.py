"""Starts a worker from a program: checks Redis, puts the parts together, gives Celery the main thread, cleans up."""

import logging
import queue
import signal
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from celery.apps.worker import Worker
from celery.exceptions import CPendingDeprecationWarning, SecurityWarning
from celery.platforms import EX_OK
from celery.signals import setup_logging
from celery.worker import state

from inferfleet.tasks import names
from inferfleet.tasks.errors import SettingsError
from inferfleet.tasks.ledger import Ledger
from inferfleet.tasks.settings import ModelSpec, Settings
from inferfleet.workers import logs
from inferfleet.workers.app import FleetApp, WakingPool, make_app
from inferfleet.workers.checks import accept_redis, check_store
from inferfleet.workers.child import ENGINE_COMMAND
from inferfleet.workers.lifecycle import Lifecycle

log = logs.get("worker")


class CeleryWorker(Worker):
    """Celery's worker program with our signals: the first asks it to drain, the second to hand everything back now."""

    _drain: Callable[[], None]
    _hurry: Callable[[], None]

    @classmethod
    def make(
        cls, app: FleetApp, name: str, slots: int, drain: Callable[[], None], hurry: Callable[[], None]
    ) -> "CeleryWorker":
        """A node called `name` (something@host) with so many threads. `drain` and `hurry` must return at once."""
        # JSON only, so root is no danger here.
        warnings.filterwarnings("ignore", category=SecurityWarning)
        setup_logging.connect(_logging_is_set_up)
        worker = cls(
            app=app,
            hostname=name,
            pool=WakingPool,
            concurrency=slots,
            loglevel=logging.getLogger().level,
            quiet=True,
            without_gossip=True,
            without_mingle=True,
        )
        worker._drain, worker._hurry = drain, hurry
        return worker

    def on_start(self) -> None:
        super().on_start()
        # What Celery 6 will do on a lost connection is set in make_app, and it would be told of at each one.
        warnings.filterwarnings("ignore", category=CPendingDeprecationWarning)
        # Nothing is consumed until the intake says so; an empty choice would mean every queue.
        queues = self.app.amqp.queues
        for name in list(queues):
            queues.deselect(name)

    def install_platform_tweaks(self, worker: Worker) -> None:
        """Our signal handlers, in the place of Celery's."""
        self._signals: queue.SimpleQueue[int] = queue.SimpleQueue()
        threading.Thread(target=self._obey, name="signals", daemon=True).start()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
            signal.signal(number, self._on_signal)

    def stop(self, in_sighandler: bool = False, exitcode: int | None = None) -> None:
        """Also reached by remote control's `shutdown`, without any signal."""
        self._drain()
        super().stop(in_sighandler, exitcode)

    def _on_signal(self, number: int, _frame: Any) -> None:
        # No lock may be taken here: the thread that was interrupted may hold it, in this very handler even.
        self._signals.put(number)
        state.should_stop = EX_OK
        self.app.intake.wake()

    def _obey(self) -> None:
        """In a thread of its own: what signals ask for."""
        draining = False
        while True:
            number = self._signals.get()
            log.info("signal", name=signal.Signals(number).name, again=draining)
            if draining or number == signal.SIGQUIT:
                self._hurry()
            else:
                self._drain()
            draining = True


def _logging_is_set_up(**_: Any) -> None:
    """A receiver of this signal keeps Celery from setting up logging itself."""


def run_worker(
    settings: Settings,
    models: Mapping[str, ModelSpec] | None = None,
    *,
    engine_command: Sequence[str] = ENGINE_COMMAND,
) -> int:
    """Carry jobs of `models` (default: settings.models) until a signal; returns the exit status.

    Raises SettingsError without models, RedisMisconfigured, LedgerUnavailable, StoreUnavailable. Must be called in the
    main thread.
    """
    models = settings.models if models is None else models
    if not models:
        raise SettingsError("a worker needs a model: set models.<name>.path", param="models")
    logs.configure(settings.log_level, settings.log_format)
    ledger = Ledger.from_url(settings.redis_url, settings.namespace)
    standing = accept_redis(ledger, settings)
    log.info("redis_checked", version=standing.version, fsync=standing.fsync, durability=standing.durability)
    check_store(settings, ledger)
    app = make_app(settings, [names.turn_queue(model, settings.namespace) for model in models])
    lifecycle = Lifecycle(settings, models, app, ledger, engine_command)
    worker = CeleryWorker.make(app, lifecycle.name, settings.slots, lifecycle.drain, lifecycle.hurry)
    lifecycle.start()
    try:
        worker.start()
    finally:
        lifecycle.stop()
        app.intake.shut()
        ledger.close()
    return int(worker.exitcode or 0)
