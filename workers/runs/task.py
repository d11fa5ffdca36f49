"""The Celery task `inferfleet.run`: what its callers may ask of Celery, and how a run keeps to it.

- Acknowledged late, with the ledger as the place of messages under way (see keeper.py): nothing of Celery's own is
  unacknowledged, which a restart of Redis would turn against the worker.
- An ETA or countdown waits in the ledger, not in a worker.
- `revoke` cancels a job that waits, `revoke(terminate=True)` one that runs; the result is REVOKED.
- Time limits cancel the job and raise Celery's own errors; a priority is the job's, unless the job has one.
"""

import json
import signal
from collections.abc import Callable
from datetime import datetime
from typing import Any

from celery import Celery, Task, states
from celery.exceptions import Ignore, InvalidTaskError, Reject
from celery.utils.time import make_aware, maybe_iso8601
from celery.worker import control, state
from celery.worker.consumer import Consumer
from celery.worker.strategy import default
from kombu.transport.virtual.base import Message

from inferfleet.tasks import errors, names
from inferfleet.workers import logs
from inferfleet.workers.app import FleetRequest, FleetTask
from inferfleet.workers.runs.keeper import Keeper
from inferfleet.workers.runs.run import HandedOn, Runs, Terms, job_id_of

log = logs.get("run")

MAX_ID = 512
#: What a message may say on Redis; 0 goes first.
PRIORITIES = range(10)


class RunRequest(FleetRequest):
    """A message that the keeper keeps."""

    def acknowledge(self) -> None:
        if not self.acknowledged:
            self.task.keeper.drop(self.id)
        super().acknowledge()

    def reject(self, requeue: bool = False) -> None:
        if requeue and not self.acknowledged:
            self.task.keeper.give_back(self.id)
            self.acknowledged = True
        self.acknowledge()

    def terminate(self, pool: Any, signal: Any = None) -> None:
        """A thread cannot be killed; it ends by itself when its job is cancelled, see `revoke`."""

    def announce_revoked(self) -> None:
        """Its job was cancelled: tell the result's reader, the chord it may belong to, and Flower."""
        self._announce_revoked("terminated", True, int(signal.SIGTERM), False)


class RunTask(FleetTask):
    """The base of the task."""

    Request = RunRequest
    Strategy = "inferfleet.workers.runs.task:keeping"
    keeper: Keeper


def keeping(task: RunTask, app: Celery, consumer: Consumer) -> Callable[..., Any]:
    """Celery's way with a message of this task, behind the keeper."""
    handle = default(task, app, consumer)

    queue = app.conf.task_default_queue

    def on_message(message: Message, body: Any, ack: Any, reject: Any, callbacks: Any) -> Any:
        fields = message.headers if body is None else body  # the second is Celery's old protocol
        task_id, eta = fields.get("id"), fields.pop("eta", None)
        if not isinstance(task_id, str) or not 0 < len(task_id) <= MAX_ID:
            raise InvalidTaskError(f"the id of a task is a text of 1 to {MAX_ID} characters")
        lane = message.channel._q_for_pri(queue, message.properties.get("priority") or 0)
        try:
            its_time = task.keeper.keep(task_id, lane, json.dumps(message.serializable()), eta_of(eta, app))
        except errors.LedgerUnavailable as error:
            log.error("message_lost", task_id=task_id, reason=error.message)
            return None
        if not its_time:
            return None
        try:
            return handle(message, body, ack, reject, callbacks)
        except Exception:
            task.keeper.drop(task_id)  # Celery refuses it, and would each time
            raise

    return on_message


def eta_of(text: str | None, app: Celery) -> int | None:
    """Unix milliseconds. Raises InvalidTaskError for what is no time."""
    if text is None:
        return None
    try:
        eta: datetime = maybe_iso8601(text)
        aware = eta if eta.tzinfo is not None else make_aware(eta, app.timezone)
        return round(aware.timestamp() * 1000)
    except (TypeError, ValueError, OverflowError, AttributeError) as error:
        raise InvalidTaskError(f"the ETA is no time: {error}") from None


def register_runs(app: Celery, runs: Runs, keeper: Keeper) -> None:
    """Give the app the task. It takes a job or a chat body as JSON values and returns the answer's body."""

    @app.task(name=names.RUN_TASK, bind=True, base=RunTask, keeper=keeper, acks_late=True)
    def run(task: Task, job: dict[str, Any]) -> dict[str, Any]:
        task_id = task.request.id
        job_id = job_id_of(task_id)
        with logs.bound(job_id=job_id):
            # Also keeps other nodes from marking it as revoked while it goes on: they do that to what nobody began.
            if not task.request.ignore_result:
                task.update_state(state=states.STARTED, meta={"job_id": job_id, "hostname": task.request.hostname})
            try:
                return runs.run(job_id, job, terms_of(task), lambda: task_id in state.revoked)
            except HandedOn as error:
                log.info("run_handed_on")
                raise Reject(error, requeue=True) from None
            except errors.JobCancelled:
                if task_id in state.requests:  # else the same message came twice, and the other one told it
                    state.requests[task_id].announce_revoked()
                raise Ignore from None


def terms_of(task: Task) -> Terms:
    """What came with the message."""
    hard, soft = task.request.timelimit or (None, None)
    given = (task.request.delivery_info or {}).get("priority")
    priority = min(max(given, PRIORITIES[0]), PRIORITIES[-1]) if isinstance(given, int) else 0
    return Terms(priority=priority, soft_time_limit=soft, time_limit=hard)


def obey_revoke(runs: Runs, keeper: Keeper) -> None:
    """Let this process's remote control cancel jobs where Celery would kill a worker's process."""

    def revoke(node: Any, task_id: Any, terminate: bool = False, signal: Any = None, **kwargs: Any) -> Any:
        ids = task_id if isinstance(task_id, list | tuple | set) else [task_id]
        answer = control.revoke(node, task_id, terminate, signal, **kwargs)
        for each in ids:
            try:
                keeper.hasten(each)
                runs.revoke(job_id_of(each), running=terminate)
            except errors.LedgerUnavailable as error:
                log.warning("not_revoked", task_id=each, reason=error.message)
        return answer

    def terminate(node: Any, signal: Any, task_id: Any, **kwargs: Any) -> Any:
        return revoke(node, task_id, terminate=True, signal=signal)

    control.Panel.data["revoke"] = revoke
    control.Panel.data["terminate"] = terminate
