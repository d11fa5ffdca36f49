"""Carries one job from claim to end; this is what a turn does. Knows the ledger and the host, not Celery.

A turn takes the best job that waits, not a certain one, so a lost, doubled or late turn does no harm.
"""

import threading
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from pydantic import ValidationError

from inferfleet.tasks import errors, names
from inferfleet.tasks.contracts import ImageRequest, ResponseRequest, check_card
from inferfleet.tasks.doorbell import Doorbell
from inferfleet.tasks.ledger import Ledger
from inferfleet.tasks.records import Claim
from inferfleet.tasks.settings import Settings
from inferfleet.workers import logs, requests
from inferfleet.workers.errand import Errand
from inferfleet.workers.flight import Ending, Flight
from inferfleet.workers.host import Host
from inferfleet.workers.media import Media
from inferfleet.workers.metrics import Meter
from inferfleet.workers.outputs import OutputWriter
from inferfleet.workers.patience import until_answered
from inferfleet.workers.pictures import ImageErrand
from inferfleet.workers.requests import ChatErrand, ResponseErrand
from inferfleet.workers.resident import Resident, State
from inferfleet.workers.seats import Seats

log = logs.get("turn")


class Watch(Protocol):
    """Whoever is told what becomes of jobs here."""

    def taken(self, job_id: str, model: str, attempt: int) -> None:
        """This worker has claimed the job."""

    def ended(self, job_id: str, state: str, code: str | None) -> None:
        """The job is over; `code` is that of its error."""

    def let_go(self, job_id: str, how: str) -> None:
        """The job is not over, and no longer carried here."""


class Porter:
    """Takes turns. Many threads use one porter."""

    def __init__(
        self,
        settings: Settings,
        worker: str,
        ledger: Ledger,
        host: Host,
        doorbell: Doorbell,
        meter: Meter,
        writer: OutputWriter,
        seats: Seats,
        on_room: Callable[[Resident], None],
        watch: Watch,
    ) -> None:
        """on_room: told when a model has no seat any more, or has one again."""
        self._settings = settings
        self._worker = worker
        self._ledger = ledger
        self._host = host
        self._doorbell = doorbell
        self._meter = meter
        self._writer = writer
        self._seats = seats
        self._on_room = on_room
        self._watch = watch
        self._media = Media()
        #: model -> what the job that was claimed last shares with others. Threads may overwrite it: it is a hint.
        self._warm: dict[str, str] = {}
        self._lease_ms = round(settings.lease_seconds * 1000)
        #: Set when no more jobs may be claimed: the worker drains.
        self.closing = threading.Event()
        #: Set when a silent ledger is no longer worth waiting for.
        self.giving_up = threading.Event()

    def take_turn(self, model: str) -> str:
        """Carry the best waiting job of a model, if there is one and this worker can; answers what became of it."""
        resident = self._host.get(model)
        if resident is None:
            return "not served here"
        if self.closing.is_set():
            return self._pass_on(model)
        if resident.state is State.FAILED:
            return self.refuse_waiting(resident)
        if not self._ready(resident):
            return "not ready"
        if not self._seats.take(resident):
            return self._pass_on(model)
        try:
            self._on_room(resident)
            return self._carry_on(resident)
        finally:
            self._seats.leave(resident)
            self._on_room(resident)

    def _pass_on(self, model: str) -> str:
        """The message is gone from the queue; another worker, or this one later, should hear it."""
        self._doorbell.ring(model)
        return "passed on"

    def _carry_on(self, resident: Resident) -> str:
        """Carry the best waiting job. While the model's seats are all taken its turns stay in their queue, so whoever
        sits goes on with the next job by itself; also while lines of batches have all the seats that they may, because
        their turns find nothing then."""
        did = "nothing waits"
        while (claim := self._claim(resident)) is not None:
            with logs.bound(job_id=claim.job_id, model=resident.model):
                job_id = claim.job_id
                errand = self._errand(resident, claim)
                del claim  # the job as it was submitted may be large; it is not kept while it runs
                did = "failed" if errand is None else self._carry(resident, errand)
                if did not in names.TERMINAL:
                    self._watch.let_go(job_id, did)
            others_go_on = self._seats.has_room(resident) and self._seats.serves_lines(resident, another=True)
            if others_go_on or self.closing.is_set() or not resident.accepts:
                break
        return did

    def refuse_waiting(self, resident: Resident) -> str:
        """Fail the jobs of a model that cannot be loaded, so that nobody waits for it for ever."""
        failure = resident.failure or {}
        error = failure | {"message": f"the model {resident.model} cannot be loaded: {failure.get('message')}"}
        while (claim := self._claim(resident)) is not None:
            with logs.bound(job_id=claim.job_id, model=resident.model):
                self._complete(claim, "failed", error=error)
        return "refused"

    def _ready(self, resident: Resident) -> bool:
        if resident.state is State.IDLE:
            resident.start()
        return resident.accepts

    def _claim(self, resident: Resident) -> Claim | None:
        # Made here, not taken from the Celery message: two messages with one id must not share a claim.
        token = uuid.uuid4().hex
        asked: dict[str, Any] = {
            "worker": self._worker,
            "token": token,
            "lease_ms": self._lease_ms,
            "online": not self._seats.serves_lines(resident),
            "affinity": self._warm.get(resident.model, ""),
        }
        claim = until_answered(lambda: self._ledger.claim(resident.model, **asked), self.closing)
        if claim is not None:
            self._warm[resident.model] = claim.affinity
            self._watch.taken(claim.job_id, resident.model, claim.attempt)
        return claim

    def _errand(self, resident: Resident, claim: Claim) -> Errand | None:
        """What there is to do for a claimed job; None where nothing can be done, and the job has failed."""
        try:
            job = requests.read_envelope(claim)
            # Also what was accepted while no worker had told what its model can do.
            check_card(job.body, resident.card)
        except ValidationError as error:
            self._complete(claim, "failed", error=unreadable(error))
            return None
        except errors.InvalidRequest as error:
            self._complete(claim, "failed", error=error.to_dict())
            return None
        if isinstance(job.body, ResponseRequest):
            return ResponseErrand(claim, job, resident.card, job.body)
        if not isinstance(job.body, ImageRequest):
            return ChatErrand(claim, job, resident.card, job.body)
        limit = self._settings.max_result_bytes
        return ImageErrand(claim, job, resident.card, job.body, max_bytes=limit, media=self._media, writer=self._writer)

    def _carry(self, resident: Resident, errand: Errand) -> str:
        self._seats.weigh(resident, errand.weight - 1)
        self._on_room(resident)
        try:
            did = self._fly(resident, errand)
        finally:
            self._seats.weigh(resident, 1 - errand.weight)
        if did != "completed":
            errand.discard()
        return did

    def _fly(self, resident: Resident, errand: Errand) -> str:
        claim, flight = errand.claim, errand.flight
        seconds, late = time_limit(claim, errand.execution_timeout)
        log.info("job_started", attempt=claim.attempt, deaths=claim.deaths, resumed_tokens=flight.resumed_tokens)
        try:
            in_time = resident.fly(flight, errand.request, alone=self._alone(claim), seconds=seconds)
        except errors.FleetError as error:
            return self._complete(claim, "failed", errand, error=error.to_dict())
        return self._conclude(errand, None if in_time else late)

    def _alone(self, claim: Claim) -> bool:
        """After a crash in company a job runs alone once; so does one whose next death would be its last."""
        return claim.suspect or claim.deaths >= max(1, self._settings.max_deaths - 1)

    def _conclude(self, errand: Errand, late: errors.JobFailed | None) -> str:
        claim, flight = errand.claim, errand.flight
        if flight.ending is Ending.STALE:
            return self._lost(flight.model)
        if flight.ending is Ending.CRASHED:
            return self._after_crash(flight)
        if late is not None:
            state = "expired" if isinstance(late, errors.DeadlineExceeded) else "failed"
            return self._complete(claim, state, errand, error=late.to_dict())
        if flight.ending is Ending.RELEASED:
            return self._hand_back(flight, suspect=False)
        if flight.ending is Ending.FAILED:
            return self._complete(claim, "failed", errand, error=flight.error)
        if flight.cancelled:
            return self._complete(claim, "cancelled", errand, error=errors.JobCancelled().to_dict())
        try:
            response = requests.to_bytes(errand.answer())
        except errors.EngineError as error:
            return self._complete(claim, "failed", errand, error=error.to_dict())
        return self._complete(claim, errand.state, errand, response=response)

    def _complete(
        self,
        claim: Claim,
        state: str,
        errand: Errand | None = None,
        *,
        response: bytes | None = None,
        error: Mapping[str, Any] | None = None,
    ) -> str:
        flight = None if errand is None else errand.flight
        usage, outputs = (None, ()) if errand is None else (errand.usage(), errand.outputs())
        keep = [output["id"] for output in outputs] if self._writer.store.in_ledger else ()
        measured = self._meter.job_ended(claim, flight, state, time.monotonic())
        end: dict[str, Any] = {
            "response": response,
            "error": error,
            "usage": usage,
            "metrics": measured,
            "outputs": outputs,
            "behind": "" if flight is None else flight.last_token,
        }
        answer = until_answered(
            lambda: self._ledger.complete(claim.job_id, claim.fence, state=state, keep=keep, **end), self.giving_up
        )
        code = None if error is None else error["code"]
        log.info("job_ended", state=state, answer=answer, code=code, **measured)
        if flight is None or answer in ("done", "same"):
            self._watch.ended(claim.job_id, state, code)
            return state
        if answer == "missing":
            flight.crash_reason = "a picture was gone from the store before the job could end"
            return self._count_death(flight)
        return self._lost(flight.model)

    def _lost(self, model: str) -> str:
        """The job belongs to somebody else by now, or is over; what this run still had to say counts for nothing."""
        self._meter.lease_lost(model)
        log.warning("lease_lost")
        return "stale"

    def _after_crash(self, flight: Flight) -> str:
        """Alone in the engine it is the culprit and a death is counted; in company each is tried alone first."""
        return self._hand_back(flight, suspect=True) if flight.num_crashed > 1 else self._count_death(flight)

    def _count_death(self, flight: Flight) -> str:
        """Give the job back with a death counted, so that what happens to it every time comes to an end."""
        how = until_answered(
            lambda: self._ledger.lose(
                flight.job_id, flight.fence, max_deaths=self._settings.max_deaths, reason=flight.crash_reason
            ),
            self.giving_up,
        )
        log.warning("job_lost", how=how)
        if how == "stale":
            return self._lost(flight.model)
        if how == "requeued":
            self._doorbell.ring(flight.model)
        return how

    def _hand_back(self, flight: Flight, *, suspect: bool) -> str:
        answer = until_answered(
            lambda: self._ledger.release(flight.job_id, flight.fence, suspect=suspect), self.giving_up
        )
        log.info("job_handed_back", answer=answer, suspect=suspect)
        if answer == "stale":
            return self._lost(flight.model)
        self._doorbell.ring(flight.model)
        return answer


def time_limit(claim: Claim, execution_timeout: float | None) -> tuple[float | None, errors.JobFailed | None]:
    """Seconds that this run may take, and the error when they are over. Redis time, whatever this clock says."""
    limits: list[tuple[float, errors.JobFailed]] = []
    if claim.deadline_ms is not None:
        limits.append((max(0.0, (claim.deadline_ms - claim.now_ms) / 1000), errors.DeadlineExceeded()))
    if execution_timeout is not None:
        message = f"the job ran longer than its execution_timeout of {execution_timeout:g} s"
        limits.append((execution_timeout, errors.ExecutionTimeout(message)))
    return min(limits, key=lambda limit: limit[0], default=(None, None))


def unreadable(error: ValidationError) -> dict[str, Any]:
    """What is wrong with a stored job, without its text."""
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    return errors.InvalidRequest(f"this worker cannot read the stored job: {first['msg']}", param=where).to_dict()
