"""The Celery task `inferfleet.run`: submit a job, wait for it, return the answer. For chains, groups and chords.

Runs only wait, and wait for turns: they are carried by a process of their own, beside the worker's, so that however
many of them wait, every slot is free for turns and nothing can wait in a circle.

The job's id is made from the task's id. So a run that is handed on (its process drains) or delivered twice finds its
job again and submits nothing twice.
"""

import hashlib
import json
import os
import signal
import socket
import sys
import threading
from collections.abc import Mapping
from functools import partial
from typing import Any

from celery import Celery, Task

from inferfleet.tasks import contracts, errors, names
from inferfleet.tasks.client import as_job
from inferfleet.tasks.contracts import ImageRequest, JobRequest
from inferfleet.tasks.doorbell import Doorbell
from inferfleet.tasks.ledger import Ledger
from inferfleet.tasks.settings import Settings
from inferfleet.workers import logs
from inferfleet.workers.patience import until_answered

log = logs.get("run")

#: Whose jobs runs are: who can write into the broker needs no API key.
TENANT = "default"


class HandedOn(Exception):
    """This process drains; the run goes on elsewhere."""


class Runs:
    """Carries runs. Many threads use one."""

    def __init__(self, settings: Settings, ledger: Ledger, doorbell: Doorbell) -> None:
        self._settings = settings
        self._ledger = ledger
        self._doorbell = doorbell
        self.closing = threading.Event()

    def run(self, job_id: str, values: Mapping[str, Any]) -> dict[str, Any]:
        """The answer's body of a job, or the typed error that it ended with. Raises HandedOn when closing.

        That of an image job has `job_id` and `outputs` in it, by which a client fetches the pictures: a result of
        Celery is no place for many megabytes.
        """
        try:
            job = as_job(values)
            if isinstance(job.body, ImageRequest) and job.body.response_format is not None:
                text = "a run answers with its job's outputs; leave response_format out, and fetch them by a client"
                raise errors.InvalidRequest(text, param="response_format")
            self._check_model(job)
            self._submit(job_id, job)
            return self._wait(job_id)
        except errors.LedgerUnavailable as error:
            raise HandedOn from error

    def _check_model(self, job: JobRequest) -> None:
        cards = until_answered(self._ledger.cards, self.closing)
        model = job.body.model
        if model not in cards and model not in self._settings.models:
            raise errors.ModelNotFound(f"no worker serves the model {model}", param="model")
        contracts.check_card(job.body, cards.get(model, {}))

    def _submit(self, job_id: str, job: JobRequest) -> None:
        envelope = job.envelope()
        while True:
            try:
                submitted = until_answered(lambda: self._submit_once(job_id, envelope, job), self.closing)
                break
            except (errors.QueueFull, errors.QuotaExceeded) as full:
                # Somebody waits for the answer anyway: wait for room rather than fail a whole chord.
                if self.closing.wait(full.retry_after or 1.0):
                    raise HandedOn from full
        if submitted.queued:
            self._doorbell.ring(job.body.model)

    def _submit_once(self, job_id: str, envelope: bytes, job: JobRequest) -> Any:
        return self._ledger.submit(
            job_id,
            envelope,
            model=job.body.model,
            tenant=TENANT,
            body_hash=contracts.body_hash(envelope),
            priority=job.effective_priority,
            deadline_ms=job.deadline_ms,
            start_timeout_ms=job.start_timeout_ms,
            max_queued=self._settings.max_queued,
            custom_id=job.custom_id,
            endpoint=job.url,
            metadata=job.labels,
            webhook=job.callback,
            webhook_words=job.callback_words,
            work=job.work,
        )

    def _wait(self, job_id: str) -> dict[str, Any]:
        after = -1
        while not self.closing.is_set():
            news = until_answered(partial(self._ledger.wait_events, job_id, after=after), self.closing)
            if news:
                after = news[-1]["sequence_number"]
            if not news or names.is_terminal_event(news[-1]["type"]):
                record = until_answered(partial(self._ledger.get, job_id), self.closing)
                if record.terminal:
                    answer = answer_of(record.response, record.error)
                    files = {"job_id": job_id, "outputs": record.outputs} if record.outputs else {}
                    return answer | files
        raise HandedOn


def answer_of(response: bytes | None, error: Mapping[str, Any] | None) -> dict[str, Any]:
    """The answer of an ended job, or its error raised."""
    if response is not None:
        return dict(json.loads(response))
    raise errors.from_dict(error or {})


def job_id_of(task_id: str) -> str:
    """The job that a Celery task makes."""
    return f"job_{hashlib.sha256(task_id.encode()).hexdigest()[:32]}"


def register_runs(app: Celery, runs: Runs) -> None:
    """Give the app the task. It takes a job or a chat body as JSON values and returns the answer's body."""

    @app.task(name=names.RUN_TASK, bind=True, max_retries=None)
    def run(task: Task, job: dict[str, Any]) -> dict[str, Any]:
        job_id = job_id_of(task.request.id)
        with logs.bound(job_id=job_id):
            try:
                return runs.run(job_id, job)
            except HandedOn:
                log.info("run_handed_on")
                raise task.retry(countdown=0) from None


def main() -> int:
    """The process: settings come as one line of JSON on stdin, and its end means that the parent is gone."""
    # Here and not above: the worker imports this module too, and needs none of it.
    from inferfleet.workers.app import make_app
    from inferfleet.workers.worker import CeleryWorker

    settings = Settings.model_validate_json(sys.stdin.readline())
    logs.configure(settings.log_level, settings.log_format)
    queue = names.run_queue(settings.namespace)
    app = make_app(settings, [queue])
    app.intake.open(queue)
    ledger = Ledger.from_url(settings.redis_url, settings.namespace)
    runs = Runs(settings, ledger, Doorbell(settings.redis_url, settings.namespace))
    register_runs(app, runs)
    threading.Thread(target=_follow_parent, name="parent", daemon=True).start()
    worker = CeleryWorker.make(
        app,
        f"inferfleet-runs-{os.getpid()}@{socket.gethostname()}",
        settings.run_slots,
        runs.closing.set,
        runs.closing.set,
    )
    worker.start()
    return int(worker.exitcode or 0)


def _follow_parent() -> None:
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
