"""What a run does: submit a job, wait for it, return the answer. Knows the ledger, and of Celery only its errors.

The job's id is made from the task's id. So a run that is handed on (its process drains) or delivered twice finds its
job again and submits nothing twice.
"""

import hashlib
import json
import re
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from celery.exceptions import SoftTimeLimitExceeded, TimeLimitExceeded

from inferfleet.tasks import contracts, errors, event_log, names
from inferfleet.tasks.client import as_job
from inferfleet.tasks.contracts import ImageRequest, JobRequest
from inferfleet.tasks.doorbell import Doorbell
from inferfleet.tasks.ledger import Ledger
from inferfleet.tasks.records import JobRecord
from inferfleet.tasks.settings import Settings
from inferfleet.workers.patience import until_answered

#: Whose jobs runs are: who can write into the broker needs no API key.
TENANT = "default"
JOB_ID = re.compile(r"job_[0-9a-f]{32}")


class HandedOn(Exception):
    """This process drains; the run goes on elsewhere."""


@dataclass(frozen=True)
class Terms:
    """What a caller asks of Celery besides the task: apply_async's priority and time limits (seconds)."""

    priority: int = 0
    soft_time_limit: float | None = None
    time_limit: float | None = None

    @property
    def limit(self) -> tuple[float, Exception]:
        """Seconds, and the error when they are over."""
        hard = self.time_limit if self.time_limit is not None else float("inf")
        if self.soft_time_limit is not None and self.soft_time_limit <= hard:
            return self.soft_time_limit, SoftTimeLimitExceeded(self.soft_time_limit)
        return hard, TimeLimitExceeded(hard)


class Runs:
    """Carries runs. Many threads use one."""

    def __init__(self, settings: Settings, ledger: Ledger, doorbell: Doorbell) -> None:
        self._settings = settings
        self._ledger = ledger
        self._doorbell = doorbell
        self.closing = threading.Event()

    def run(
        self,
        job_id: str,
        values: Mapping[str, Any],
        terms: Terms | None = None,
        revoked: Callable[[], bool] = lambda: False,
    ) -> dict[str, Any]:
        """The answer's body of a job, or the typed error that it ended with. Raises HandedOn when closing, and Celery's
        error when a time limit of the terms is over: the job is cancelled then. `revoked`: nobody wants it any more.

        The answer of an image job has `job_id` and `outputs` in it, by which a client fetches the pictures: a result of
        Celery is no place for many megabytes.
        """
        terms = terms or Terms()
        seconds, late = terms.limit
        until = time.monotonic() + seconds
        try:
            job = as_job(values)
            if isinstance(job.body, ImageRequest) and job.body.response_format is not None:
                text = "a run answers with its job's outputs; leave response_format out, and fetch them by a client"
                raise errors.InvalidRequest(text, param="response_format")
            self._check_model(job)
            if not self._submit(job_id, job, terms, until, revoked):
                raise late
            if revoked():
                self.revoke(job_id)  # it came while the job was being submitted
            record = self._wait(job_id, until)
            if record is None:
                if self._cancel(job_id):
                    raise late
                record = self._record(job_id)
            answer = answer_of(record.response, record.error)
            return answer | ({"job_id": job_id, "outputs": record.outputs} if record.outputs else {})
        except errors.LedgerUnavailable as error:
            raise HandedOn from error

    def revoke(self, job_id: str, *, running: bool = False) -> None:
        """Cancel a job if it still waits; with `running` also one that runs. Nothing for a job that is not there.

        A job that starts between the two looks at it is cancelled too.
        """
        try:
            if running or self._ledger.get(job_id).state == "queued":
                self._ledger.cancel(job_id)
        except (errors.JobNotFound, errors.AlreadyTerminal):
            pass

    def _check_model(self, job: JobRequest) -> None:
        cards = until_answered(self._ledger.cards, self.closing)
        model = job.body.model
        if model not in cards and model not in self._settings.models:
            raise errors.ModelNotFound(f"no worker serves the model {model}", param="model")
        contracts.check_card(job.body, cards.get(model, {}))

    def _submit(self, job_id: str, job: JobRequest, terms: Terms, until: float, revoked: Callable[[], bool]) -> bool:
        """False when there was no room in the queue in time."""
        envelope = job.envelope()
        while True:
            if revoked():
                raise errors.JobCancelled()
            try:
                submitted = until_answered(lambda: self._submit_once(job_id, envelope, job, terms), self.closing)
                break
            except (errors.QueueFull, errors.QuotaExceeded) as full:
                # Somebody waits for the answer anyway: wait for room rather than fail a whole chord.
                left = until - time.monotonic()
                if left <= 0:
                    return False
                if self.closing.wait(min(full.retry_after or 1.0, left)):
                    raise HandedOn from full
        if submitted.queued:
            self._doorbell.ring(job.body.model)
        return True

    def _submit_once(self, job_id: str, envelope: bytes, job: JobRequest, terms: Terms) -> Any:
        return self._ledger.submit(
            job_id,
            envelope,
            tenant=TENANT,
            body_hash=contracts.body_hash(envelope),
            max_queued=self._settings.max_queued,
            **job.terms() | {"priority": priority_of(job, terms)},
        )

    def _wait(self, job_id: str, until: float) -> JobRecord | None:
        """The ended job; None when it did not end in time."""
        after = -1
        while not self.closing.is_set():
            left = until - time.monotonic()
            if left <= 0:
                return None
            block = max(1, round(min(left * 1000, event_log.MAX_BLOCK_MS)))
            news = until_answered(partial(self._ledger.wait_events, job_id, after=after, block_ms=block), self.closing)
            if news:
                after = news[-1]["sequence_number"]
            if not news or names.is_terminal_event(news[-1]["type"]):
                record = self._record(job_id)
                if record.terminal:
                    return record
        raise HandedOn

    def _record(self, job_id: str) -> JobRecord:
        return until_answered(partial(self._ledger.get, job_id), self.closing)

    def _cancel(self, job_id: str) -> bool:
        """False when the job had just ended otherwise."""
        try:
            until_answered(partial(self._ledger.cancel, job_id), self.closing)
        except errors.AlreadyTerminal:
            return False
        return True


def answer_of(response: bytes | None, error: Mapping[str, Any] | None) -> dict[str, Any]:
    """The answer of an ended job, or its error raised."""
    if response is not None:
        return dict(json.loads(response))
    raise errors.from_dict(error or {})


def priority_of(job: JobRequest, terms: Terms) -> int:
    """The job's own word counts; where it has none, the message's. Both are lower-first."""
    return terms.priority if job.wished_priority is None else job.wished_priority


def job_id_of(task_id: str) -> str:
    """The job that a Celery task makes: of the same digits as its id where that is a UUID, as Celery's own are. An id
    that looks like a job's is the job's, so a caller who chooses the task's id knows the job."""
    if JOB_ID.fullmatch(task_id):
        return task_id
    try:
        digits = uuid.UUID(task_id).hex
    except ValueError:
        digits = hashlib.sha256(task_id.encode()).hexdigest()[:32]
    return f"job_{digits}"
