"""Celery's task events about jobs, so that what watches Celery (Flower, `celery events`) shows each job by its own id.

A turn's own events carry the id of a message, and a turn may carry several jobs. So a job has events of its own, as of
a task JOB_TASK whose id is the job's. They are sent only while somebody asked for task events, as Flower does.
"""

import time
from typing import Any

from celery import current_task
from celery.worker import state as node

from inferfleet.tasks import names
from inferfleet.workers.app import Intake


class JobEvents:
    """Told by the porter, from many threads, what becomes of jobs here."""

    def __init__(self, intake: Intake) -> None:
        self._intake = intake
        self._since: dict[str, float] = {}

    def taken(self, job_id: str, model: str, attempt: int) -> None:
        """This worker has claimed the job."""
        self._since[job_id] = time.monotonic()
        if current_task and (request := node.requests.get(current_task.request.id)) is not None:
            request.job_id = job_id  # for `inspect active`
        what = {"name": names.JOB_TASK, "args": repr([model]), "kwargs": "{}", "root_id": job_id, "parent_id": None}
        self._send("task-received", job_id, **what, retries=attempt - 1, eta=None, expires=None)
        self._send("task-started", job_id)

    def ended(self, job_id: str, state: str, code: str | None) -> None:
        """It is over. Says how, and never what the answer was."""
        runtime = time.monotonic() - self._since.pop(job_id, time.monotonic())
        if state in ("completed", "incomplete"):
            self._send("task-succeeded", job_id, result=state, runtime=runtime)
        elif state == "cancelled":
            self._send("task-revoked", job_id, terminated=True, signum=None, expired=False)
        else:
            self._send("task-failed", job_id, exception=code or state, traceback="")

    def let_go(self, job_id: str, how: str) -> None:
        """It goes on elsewhere, or later."""
        self._since.pop(job_id, None)
        self._send("task-retried", job_id, exception=how, traceback="")

    def _send(self, kind: str, job_id: str, **fields: Any) -> None:
        dispatcher = self._intake.dispatcher
        if dispatcher is not None:
            dispatcher.send(kind, uuid=job_id, **fields)
            self._intake.wake()  # the event loop sends what is gathered
