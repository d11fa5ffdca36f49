"""GET /v1/outputs/{id}: a picture's file, to whoever has its signed url or a key of its tenant."""

import time
from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Security
from fastapi.security import HTTPAuthorizationCredentials
from starlette.responses import RedirectResponse, Response

from inferfleet.tasks import names, roster
from inferfleet.tasks.errors import JobNotFound, OutputNotFound
from inferfleet.tasks.records import JobRecord
from inferfleet.workers.api.auth import bearer, tenant
from inferfleet.workers.api.openapi import OUTPUT
from inferfleet.workers.api.parameters import path_id
from inferfleet.workers.api.services import Services, Use
from inferfleet.workers.url_signing import check_signature

router = APIRouter(tags=["jobs"])

#: How long a link to the store works.
LINK_SECONDS = 60

OutputId = Annotated[str, path_id(names.OUTPUT_ID.pattern)]
Expires = Annotated[str | None, Query(max_length=20, description="Unix seconds, as the url came")]
Signature = Annotated[str | None, Query(max_length=128, description="as the url came")]
Bearer = Annotated[HTTPAuthorizationCredentials | None, Security(bearer)]


@router.get("/v1/outputs/{output_id}", openapi_extra=OUTPUT)
async def get_output(
    output_id: OutputId, request: Request, use: Use, key: Bearer, expires: Expires = None, signature: Signature = None
) -> Response:
    """A picture's file. Its url needs no API key while its signature holds; without one a key is asked for."""
    record, output = await _find(output_id, request, use, key, expires, signature)
    headers = _headers(use, record, output)
    if headers["etag"] in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    if (place := _elsewhere(use, output_id, output)) is not None:
        return RedirectResponse(place, headers={"cache-control": "no-store"})
    data = await use.store.get(output_id, output["hash"].removeprefix("sha256:"))
    return Response(data, headers=headers, media_type=output["content_type"])


@router.head("/v1/outputs/{output_id}", include_in_schema=False)
async def head_output(
    output_id: OutputId, request: Request, use: Use, key: Bearer, expires: Expires = None, signature: Signature = None
) -> Response:
    """The headers of the file alone."""
    record, output = await _find(output_id, request, use, key, expires, signature)
    headers = {**_headers(use, record, output), "content-length": str(output["size_bytes"])}
    return Response(headers=headers, media_type=output["content_type"])


def _elsewhere(use: Services, output_id: str, output: Mapping[str, Any]) -> str | None:
    """A link to the store itself, where clients may go there. It works for a minute: whoever follows it does so now."""
    if not use.settings.s3.public_links:
        return None
    kind = output["content_type"]
    name = f"{output_id}.{kind.rpartition('/')[2]}"
    return use.store.presign(output_id, content_type=kind, filename=name, seconds=LINK_SECONDS)


async def _find(
    output_id: str,
    request: Request,
    use: Services,
    key: HTTPAuthorizationCredentials | None,
    expires: str | None,
    signature: str | None,
) -> tuple[JobRecord, Mapping[str, Any]]:
    """The job and the file. Raises InvalidSignature, UrlExpired, Unauthorized, OutputNotFound."""
    owner = None
    if expires is None and signature is None:
        owner = await tenant(request, key)
    else:
        secret = await use.ledger.run(roster.signing_secret())
        check_signature(output_id, expires or "", signature or "", secret)
    job_id = names.job_of_output(output_id)
    try:
        record = None if job_id is None else await use.ledger.get(job_id, owner)
    except JobNotFound:
        record = None
    for output in (record.outputs if record is not None else None) or ():
        if output["id"] == output_id and record is not None:
            return record, output
    raise OutputNotFound(param="output_id")


def _headers(use: Services, record: JobRecord, output: Mapping[str, Any]) -> dict[str, str]:
    """The file never changes under its id, so it may be kept until its job goes; nothing in it may run as a page."""
    left = (record.finished_ms or 0) / 1000 + use.settings.result_ttl_seconds - time.time()
    name = f"{record.id}-{output['index']}.{output['content_type'].rpartition('/')[2]}"
    return {
        "etag": f'"{output["hash"].removeprefix("sha256:")}"',
        "cache-control": f"private, max-age={max(0, int(left))}, immutable",
        "content-disposition": f'inline; filename="{name}"',
        "content-security-policy": "default-src 'none'; sandbox",
        "x-content-type-options": "nosniff",
    }
