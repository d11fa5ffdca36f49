"""The life of a worker: what it is made of, how it begins, drains and ends. Celery is somebody else's business.

turn ── Porter ── Host ── Resident ── engine process         one a model
          │         ├── Publisher ── event log               what flights say
          │         └── OutputWriter ── store                pictures
          ├── Seats      how many jobs of each model
          ├── Heart      leases of what moves
          ├── Janitor    lost workers, late jobs, lost rings; the worker's own upkeep
          ├── Cancels    running jobs that are cancelled
          └── RunsProcess   `inferfleet.run`, beside the slots
"""

import os
import socket
import threading
import time
import uuid
from collections.abc import Mapping, Sequence

from inferfleet.tasks import names
from inferfleet.tasks.doorbell import Doorbell
from inferfleet.tasks.errors import LedgerUnavailable
from inferfleet.tasks.ledger import Ledger
from inferfleet.tasks.settings import ModelSpec, Settings
from inferfleet.tasks.stores import open_store
from inferfleet.workers import logs
from inferfleet.workers.app import FleetApp
from inferfleet.workers.cancels import Cancels
from inferfleet.workers.cards import LIVES, Cards
from inferfleet.workers.flight import Ending, Flight
from inferfleet.workers.heart import Heart
from inferfleet.workers.host import Host
from inferfleet.workers.janitor import Janitor
from inferfleet.workers.job_events import JobEvents
from inferfleet.workers.loading import is_due, view_for
from inferfleet.workers.metrics import Meter, Snapshots
from inferfleet.workers.neighbours import Neighbours
from inferfleet.workers.outputs import OutputWriter
from inferfleet.workers.porter import Porter
from inferfleet.workers.publisher import Publisher, publish_all
from inferfleet.workers.resident import Resident, State
from inferfleet.workers.rewriter import Rewriter
from inferfleet.workers.runs.child import RunsProcess
from inferfleet.workers.seats import Seats
from inferfleet.workers.turns import register_turns

#: A card of a model that loads is renewed at each phase, and within it after so many seconds.
CARD_SECONDS = 1.0

log = logs.get("worker")


class Lifecycle:
    """One worker process."""

    def __init__(
        self,
        settings: Settings,
        models: Mapping[str, ModelSpec],
        app: FleetApp,
        ledger: Ledger,
        engine_command: Sequence[str],
    ) -> None:
        self.name = worker_name()
        self._settings = settings
        self._app = app
        self._ledger = ledger
        self._next_upkeep = 0.0
        self._drain_lock = threading.Lock()
        self._intake_lock = threading.Lock()
        self._grace: threading.Timer | None = None
        self._loading = view_for(settings.log_format)
        self._told: dict[str, tuple[str, float]] = {}
        ttl = LIVES * settings.heartbeat_seconds
        self._meter = Meter()
        self._publisher = Publisher(lambda batch: publish_all(ledger, batch), self._cancel)
        self._host = Host(
            models,
            publisher=self._publisher,
            on_change=self._on_change,
            on_progress=self._on_progress,
            command=engine_command,
            load_seconds=settings.load_seconds,
        )
        self._meter.engines.residents = self._host.residents()
        self._writer = OutputWriter(open_store(settings, ledger), self._publisher)
        self._seats = Seats(settings.slots, self._host.residents(), settings.reserved_slots)
        doorbell = Doorbell(settings.redis_url, settings.namespace)
        self._porter = Porter(
            settings,
            self.name,
            ledger,
            self._host,
            doorbell,
            self._meter,
            self._writer,
            self._seats,
            self._tend,
            JobEvents(app.intake),
        )
        self._cards = Cards(ledger, self.name, slots=settings.slots, heartbeat_seconds=settings.heartbeat_seconds)
        self._snapshots = Snapshots(ledger, self.name, self._meter, ttl)
        self._neighbours = Neighbours(ledger, self.name, max(ttl, 2 * settings.lease_seconds))
        self._heart = self._make_heart()
        self._janitor = self._make_janitor(doorbell)
        self._rewriter = Rewriter(ledger.redis)
        self._cancels = Cancels(ledger, self._on_cancelled)
        self._runs = RunsProcess(settings) if settings.run_slots else None
        register_turns(app, self._porter)

    def _make_heart(self) -> Heart:
        settings = self._settings
        return Heart(
            self._ledger,
            self.name,
            self._host.residents,
            heartbeat_seconds=settings.heartbeat_seconds,
            lease_seconds=settings.lease_seconds,
            stall_seconds=settings.stall_seconds,
        )

    def _make_janitor(self, doorbell: Doorbell) -> Janitor:
        settings = self._settings
        return Janitor(
            self._ledger,
            doorbell,
            sweep_seconds=settings.sweep_seconds,
            lease_seconds=settings.lease_seconds,
            max_deaths=settings.max_deaths,
            result_ttl_seconds=settings.result_ttl_seconds,
            dead_letter_ttl_seconds=settings.dead_letter_ttl_seconds,
            neighbours=self._neighbours,
            on_reaped=self._meter.reaped,
            upkeep=self._upkeep,
        )

    def start(self) -> None:
        """Everything but Celery."""
        if self._settings.metrics_port is not None:
            port = self._meter.serve(self._settings.metrics_host, self._settings.metrics_port)
            log.info("metrics_served", host=self._settings.metrics_host, port=port)
        for resident in self._host.residents():
            self._on_change(resident)
        self._host.start()
        self._heart.start()
        self._janitor.start()
        self._cancels.start()
        if self._runs is not None:
            self._runs.start()
        log.info("worker_started", worker=self.name, models=[r.model for r in self._host.residents()])

    def drain(self) -> None:
        """Claim nothing more; what runs has drain_grace_seconds to finish, then it is handed back."""
        with self._drain_lock:
            if self._porter.closing.is_set():
                return
            self._porter.closing.set()
        log.info("draining", flights=len(self._host.flights()), grace_seconds=self._settings.drain_grace_seconds)
        self._grace = threading.Timer(self._settings.drain_grace_seconds, self.hurry)
        self._grace.daemon = True
        self._grace.start()
        if self._runs is not None:
            self._runs.ask_to_stop()

    def hurry(self) -> None:
        """Hand everything back now."""
        self.drain()
        self._porter.giving_up.set()
        for resident, flight in self._host.flights():
            resident.let_go(flight, Ending.RELEASED)

    def stop(self) -> None:
        """Celery has ended, and with it every turn: take the rest apart and leave the fleet."""
        if self._grace is not None:
            self._grace.cancel()
        for part in (self._cancels, self._janitor, self._heart, self._writer, self._publisher, self._host):
            part.stop()
        if self._runs is not None:
            self._runs.stop()
        try:
            self._cards.leave(self._host.residents())
            self._snapshots.leave()
            self._neighbours.forget(self.name)
        except LedgerUnavailable as error:
            log.warning("left_without_a_word", reason=error.message)
        log.info("worker_stopped", worker=self.name)

    def _on_change(self, resident: Resident) -> None:
        """A model's state changed: take its turns or not, tell the fleet, and look for jobs that waited for this."""
        self._tend(resident)
        if resident.state is not State.LOADING:
            self._loading.end(resident.model)
        self._publish_card(resident)
        if resident.state in (State.READY, State.FAILED):
            self._janitor.nudge()

    def _tend(self, resident: Resident) -> None:
        """Take turns of a model that is up, or will be at its first turn, while it has a seat."""
        queue = names.turn_queue(resident.model, self._settings.namespace)
        with self._intake_lock:
            if resident.state in (State.READY, State.IDLE) and self._seats.has_room(resident):
                self._app.intake.open(queue)
            else:
                self._app.intake.close(queue)

    def _on_progress(self, resident: Resident) -> None:
        """An engine said how far it is with loading: who looks is shown, and now and then the fleet."""
        if (loading := resident.loading) is not None:
            self._loading.show(resident.model, loading)
            if is_due(self._told, resident.model, loading.phase, CARD_SECONDS):
                self._publish_card(resident)

    def _publish_card(self, resident: Resident) -> None:
        try:
            self._cards.publish_one(resident)
        except LedgerUnavailable as error:
            log.warning("card_not_published", model=resident.model, reason=error.message)

    def _on_cancelled(self, job_id: str) -> None:
        for resident, flight in self._host.flights():
            if flight.job_id == job_id:
                resident.cancel(flight)

    def _cancel(self, flight: Flight) -> None:
        self._host[flight.model].cancel(flight)

    def _upkeep(self) -> None:
        """After every round of the janitor; cards and figures at every heartbeat."""
        for resident in self._host.residents():
            if resident.state is State.FAILED:
                self._stand_in(resident)
        if self._runs is not None and not self._porter.closing.is_set():
            self._runs.revive()
        if time.monotonic() >= self._next_upkeep:
            self._next_upkeep = time.monotonic() + self._settings.heartbeat_seconds
            state = "draining" if self._porter.closing.is_set() else "serving"
            self._cards.publish(self._host.residents(), state=state)
            self._snapshots.publish()
            self._neighbours.announce()
        self._rewriter.round()

    def _stand_in(self, resident: Resident) -> None:
        """For a model that failed here: its jobs are another worker's, or if there is none they fail here."""
        queue = names.turn_queue(resident.model, self._settings.namespace)
        if self._cards.served_elsewhere(resident.model):
            self._app.intake.close(queue)
        else:
            self._app.intake.open(queue)
            self._porter.refuse_waiting(resident)


def worker_name() -> str:
    """Also the Celery node's. New at every start, because a lease belongs to a process and pids come again."""
    return f"inferfleet-{os.getpid()}-{uuid.uuid4().hex[:6]}@{socket.gethostname()}"
