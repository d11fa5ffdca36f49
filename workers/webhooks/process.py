"""`inferfleet webhooks`: a Celery worker that sends what the outbox holds. Needs no model, no torch and no GPU.

Celery carries turns: "somebody, send the webhooks that are due". The outbox is the truth, so a turn that is lost is
rung for again, and one too many finds nothing.
"""

import os
import socket
import threading
import time
import uuid

import redis
from celery import Celery

from inferfleet.tasks import names
from inferfleet.tasks.call import Call
from inferfleet.tasks.doorbell import Doorbell
from inferfleet.tasks.errors import LedgerUnavailable
from inferfleet.tasks.ledger import Ledger
from inferfleet.tasks.settings import Settings
from inferfleet.workers import logs
from inferfleet.workers.app import make_app
from inferfleet.workers.cards import LIVES
from inferfleet.workers.checks import accept_redis
from inferfleet.workers.webhooks.courier import Courier
from inferfleet.workers.webhooks.figures import HookFigures
from inferfleet.workers.webhooks.guard import Policy
from inferfleet.workers.webhooks.sender import Sender
from inferfleet.workers.worker import CeleryWorker

log = logs.get("webhooks")

RETRY_SECONDS = 1.0
#: Turns for one receiver that has work: more than it takes at once would find nothing.
TURNS_A_RECEIVER = 2


def register_deliveries(app: Celery, courier: Courier) -> None:
    """Give the app its turns."""

    @app.task(name=names.DELIVER_TASK, ignore_result=True)
    def deliver() -> int:
        return courier.take_turn()


class Bell:
    """One thread a worker: hears at once when something is put into the outbox, looks every sweep_seconds for what has
    become due, and rings for both."""

    def __init__(self, ledger: Ledger, doorbell: Doorbell, figures: HookFigures, settings: Settings) -> None:
        self._ledger = ledger
        self._doorbell = doorbell
        self._figures = figures
        self._settings = settings
        self._queue = names.deliver_queue(settings.namespace)
        self._next_figures = 0.0
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="bell", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                self._listen()
            except (redis.RedisError, OSError, LedgerUnavailable) as error:
                log.warning("outbox_unavailable", error=type(error).__name__)
                self._stopping.wait(RETRY_SECONDS)
            except Exception:
                log.exception("round_broke")
                self._stopping.wait(RETRY_SECONDS)

    def _listen(self) -> None:
        with self._ledger.redis.pubsub() as channel:
            channel.subscribe(f"{self._ledger.prefix}hooks")
            while not self._stopping.is_set():
                self.round()
                channel.get_message(timeout=self._settings.sweep_seconds)
                while channel.get_message() is not None:
                    pass  # one round is for all that was said so far

    def round(self) -> None:
        """Forget old deliveries, ring for those that are due."""
        due = self._ledger.sweep_deliveries()
        if due:
            waiting = self._ledger.run(Call("", ("LLEN", self._queue), int))
            missing = min(TURNS_A_RECEIVER * due, self._settings.webhook_slots) - waiting
            if missing > 0:
                self._doorbell.ring_webhooks(missing)
        if time.monotonic() >= self._next_figures:
            self._next_figures = time.monotonic() + self._settings.heartbeat_seconds
            self._figures.publish()


def run_webhooks(settings: Settings, sender: Sender | None = None) -> int:
    """Send webhooks until a signal; returns the exit status.

    Raises RedisMisconfigured, LedgerUnavailable. Must be called in the main thread.
    """
    logs.configure(settings.log_level, settings.log_format)
    ledger = Ledger.from_url(settings.redis_url, settings.namespace)
    accept_redis(ledger, settings)
    name = f"inferfleet-webhooks-{os.getpid()}-{uuid.uuid4().hex[:6]}@{socket.gethostname()}"
    figures = HookFigures(ledger, name, LIVES * settings.heartbeat_seconds)
    courier = Courier(
        ledger,
        sender or Sender(Policy.of(settings), seconds=settings.webhook_timeout_seconds),
        timeout_seconds=settings.webhook_timeout_seconds,
        keep_seconds=settings.result_ttl_seconds,
        on_attempt=figures.count,
    )
    queue = names.deliver_queue(settings.namespace)
    app = make_app(settings, [queue])
    app.intake.open(queue)
    register_deliveries(app, courier)
    worker = CeleryWorker.make(app, name, settings.webhook_slots, courier.closing.set, courier.closing.set)
    doorbell = Doorbell(settings.redis_url, settings.namespace)
    bell = Bell(ledger, doorbell, figures, settings)
    bell.start()
    log.info("webhooks_started", worker=name, slots=settings.webhook_slots)
    try:
        worker.start()
    finally:
        bell.stop()
        _leave(figures)
        doorbell.close()
        app.intake.shut()
        ledger.close()
    log.info("webhooks_stopped", worker=name)
    return int(worker.exitcode or 0)


def _leave(figures: HookFigures) -> None:
    try:
        figures.leave()
    except LedgerUnavailable as error:
        log.warning("left_without_a_word", reason=error.message)
