"""Waiting for a job on behalf of an HTTP client who may leave."""

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from fastapi import Request
from starlette.responses import Response

from inferfleet.tasks.errors import AlreadyTerminal, JobNotFound, LedgerUnavailable
from inferfleet.tasks.records import Submitted
from inferfleet.workers import logs
from inferfleet.workers.api.accept import replay_headers
from inferfleet.workers.api.prefer import Prefer
from inferfleet.workers.api.services import Services
from inferfleet.workers.api.showing import accepted_response, answer_response
from inferfleet.workers.api.sse import cancel_and_wait, gone

log = logs.get("api")

T = TypeVar("T")

#: nginx's number for a client that left; nobody reads it but the metrics.
CLIENT_LEFT = 499


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


async def answered(request: Request, use: Services, submitted: Submitted, tenant: str, prefer: Prefer) -> Response:
    """The answer of an accepted job, or the job itself where the client would rather not wait for it.

    Raises ClientGone, and the error that the job ended with.
    """
    job_id, seconds = submitted.job_id, prefer.wait_seconds
    headers = replay_headers(submitted)
    if seconds is None:
        record = await unless_gone(request, use.hub.until_ended(job_id, tenant))
        return await answer_response(request, use, record, headers)
    if seconds == 0:  # whoever asks for a job and not for its answer gets the job, even one that has ended already
        record = await use.ledger.get(job_id, tenant)
    else:
        record = await unless_gone(request, use.hub.until_ended(job_id, tenant, seconds))
    headers["preference-applied"] = f"wait={seconds:.0f}" if seconds else "respond-async"
    if seconds and record.terminal:
        return await answer_response(request, use, record, headers)
    return await accepted_response(request, use, record, headers)


async def leave(request: Request, use: Services, job_id: str, tenant: str) -> Response:
    """What to do about the job of a client that left: it may come back for it if it named an Idempotency-Key."""
    if "idempotency-key" not in request.headers:
        await cancel_for_nobody(use, job_id, tenant)
    return Response(status_code=CLIENT_LEFT)
