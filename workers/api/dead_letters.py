"""/v1/dead_letters: jobs that took down every worker that tried them; looked into, replayed, deleted."""

from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request
from starlette.responses import Response

from inferfleet.tasks.calls import MAX_PAGE
from inferfleet.tasks.errors import JobNotFound
from inferfleet.workers.api import openapi_dead
from inferfleet.workers.api.auth import Tenant
from inferfleet.workers.api.jobs import JOB_ID, JobId
from inferfleet.workers.api.parameters import check_after, only_known_parameters, query_id
from inferfleet.workers.api.responses import json_response, page_response
from inferfleet.workers.api.services import Use
from inferfleet.workers.api.showing import job_response, shown

router = APIRouter(prefix="/v1/dead_letters", tags=["dead letters"], dependencies=[Depends(only_known_parameters)])


@router.get("", openapi_extra=openapi_dead.LIST)
async def list_dead_letters(
    request: Request,
    tenant: Tenant,
    use: Use,
    model: Annotated[str | None, Query(max_length=256, description="only jobs of this model")] = None,
    after: Annotated[str | None, query_id(JOB_ID.pattern)] = None,
    limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = 20,
) -> Response:
    """The caller's dead letters, newest first."""
    check_after(after, JOB_ID, JobNotFound)
    page = await use.ledger.dead_letters(tenant, model, after, limit)
    data = [job.model_dump(mode="json") for job in await shown(request, use, page.jobs)]
    return page_response(data, page.has_more)


@router.get("/{job_id}", openapi_extra=openapi_dead.GET)
async def get_dead_letter(request: Request, job_id: JobId, tenant: Tenant, use: Use) -> Response:
    """One, with what is known of each attempt: its worker, its times, and how that died."""
    letter = await use.ledger.dead_letter(job_id, tenant)
    (job,) = await shown(request, use, [letter.record])
    attempts = [attempt.to_dict() for attempt in letter.attempts]
    body = {"id": job_id, "object": "dead_letter", "last_worker": letter.record.worker, "attempts": attempts}
    return json_response({**body, "job": job.model_dump(mode="json")})


@router.post("/{job_id}/replay", status_code=202, openapi_extra=openapi_dead.REPLAY)
async def replay_dead_letter(request: Request, job_id: JobId, tenant: Tenant, use: Use) -> Response:
    """Queue it again, under the same id and from nothing: what killed its workers may be mended."""
    model = await use.ledger.replay(job_id, tenant)
    use.door.ring(model)
    return await job_response(request, use, await use.ledger.get(job_id, tenant), 202)


@router.delete("/{job_id}", openapi_extra=openapi_dead.DELETE)
async def delete_dead_letter(job_id: JobId, tenant: Tenant, use: Use) -> Response:
    """Forget it before its time is over."""
    await use.ledger.delete_dead_letter(job_id, tenant)
    return json_response({"id": job_id, "object": "dead_letter.deleted", "deleted": True})
