"""Waiting for a job on behalf of an HTTP client who may leave."""

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from fastapi import Request
from starlette.responses import Response

from inferfleet.tasks.errors import AlreadyTerminal, JobFailed, JobNotFound, LedgerUnavailable, from_dict
from inferfleet.tasks.job_object import Job, to_job_object
from inferfleet.tasks.records import JobRecord
from inferfleet.workers import logs
from inferfleet.workers.api.services import Services
from inferfleet.workers.api.sse import cancel_and_wait, gone

log = logs.get("api")

T = TypeVar("T")

#: When to ask again, for clients that poll.
POLL_AFTER_MS = "1000"


class ClientGone(Exception):
    """The client closed the connection before its answer was ready."""


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`. Raises ClientGone, with `work` cancelled, if the client leaves first."""
    worker = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(gone(request.receive))
    try:
        await asyncio.wait({worker, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not worker.done():
            raise ClientGone
        return worker.result()
    finally:
        await cancel_and_wait(worker, watcher)


async def cancel_for_nobody(use: Services, job_id: str, tenant: str) -> None:
    """Cancels a job whose only reader left; one that somebody else waits for goes on."""
    if use.hub.watched(job_id):
        return
    try:
        await use.ledger.cancel(job_id, tenant)
        log.info("job_cancelled_by_disconnect", job_id=job_id)
    except (AlreadyTerminal, JobNotFound):
        pass
    except LedgerUnavailable as error:
        log.warning("job_cancel_failed", job_id=job_id, reason=error.message)


def answer_of(record: JobRecord) -> bytes:
    """The JSON of an ended job's answer. Raises the error that it failed with."""
    if record.response is not None:
        return record.response
    raise from_dict(record.error) if record.error else JobFailed(f"the job ended as {record.state}")


def shown(use: Services, record: JobRecord) -> Job:
    """The job object of a record."""
    settings = use.settings
    return to_job_object(record, max_attempts=settings.max_deaths, result_ttl_seconds=settings.result_ttl_seconds)


def job_response(
    use: Services, record: JobRecord, status: int = 200, headers: dict[str, str] | None = None
) -> Response:
    """The job object as an answer, with the polling hint while it has not ended."""
    polling = {} if record.terminal else {"openai-poll-after-ms": POLL_AFTER_MS}
    body = shown(use, record).model_dump_json()
    return Response(body, status, {**polling, **(headers or {})}, media_type="application/json")


def accepted_response(use: Services, record: JobRecord, headers: dict[str, str]) -> Response:
    """202 with the job object, as far as it has come, and where to find it."""
    return job_response(use, record, 202, {"location": f"/v1/jobs/{record.id}", **headers})
