"""POST /v1/images/generations and /edits: the OpenAI SDK's calls, answered by a job like every other."""

import asyncio

from fastapi import APIRouter, Request
from starlette.responses import Response

from inferfleet.tasks.contracts import (
    ImageEditRequest,
    ImageGenerationRequest,
    JobRequest,
    parse_edit,
    parse_images,
)
from inferfleet.workers.api.accept import accept
from inferfleet.workers.api.auth import Tenant
from inferfleet.workers.api.body import check_json, media_type, read_contract
from inferfleet.workers.api.image_form import parse_edit_form
from inferfleet.workers.api.multipart import read_form
from inferfleet.workers.api.openapi import EDITS, IMAGES
from inferfleet.workers.api.prefer import read_prefer
from inferfleet.workers.api.services import Services, Use
from inferfleet.workers.api.waiting import ClientGone, answered, leave

router = APIRouter(tags=["OpenAI"])

FORM = "multipart/form-data"


@router.post("/v1/images/generations", openapi_extra=IMAGES)
async def create_image(request: Request, tenant: Tenant, use: Use) -> Response:
    """Paint pictures from a prompt: at once, or as a job (`Prefer: respond-async` or `wait=N`).

    A client that leaves cancels its job, unless it sent an Idempotency-Key: then it may come back for it.
    """
    asked = await read_contract(request, use.settings.max_body_bytes, parse_images)
    return await _paint(request, use, tenant, asked)


@router.post("/v1/images/edits", openapi_extra=EDITS)
async def create_image_edit(request: Request, tenant: Tenant, use: Use) -> Response:
    """Paint pictures that start from one: a form with a file, or JSON with a data URL. Else as generations."""
    return await _paint(request, use, tenant, await _read_edit(request, use.settings.max_edit_bytes))


async def _read_edit(request: Request, limit: int) -> ImageEditRequest:
    if media_type(request) == FORM:
        parts = await read_form(request, limit)
        return await asyncio.to_thread(parse_edit_form, parts)
    check_json(request, besides=f" or {FORM}")
    return await read_contract(request, limit, parse_edit)


async def _paint(
    request: Request, use: Services, tenant: str, asked: ImageGenerationRequest | ImageEditRequest
) -> Response:
    prefer = read_prefer(request.headers)
    await use.door.check(asked)
    submitted = await accept(use, request.headers, JobRequest.from_body(asked), tenant)
    try:
        return await answered(request, use, submitted, tenant, prefer)
    except ClientGone:
        return await leave(request, use, submitted.job_id, tenant)
