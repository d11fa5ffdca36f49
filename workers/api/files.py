"""/v1/files: OpenAI's files, uploaded and read as streams; their bytes lie in the store, in parts."""

from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal
from urllib.parse import quote

from fastapi import APIRouter, Depends, Query, Request
from starlette.requests import ClientDisconnect
from starlette.responses import Response, StreamingResponse

from inferfleet.tasks import files
from inferfleet.tasks.errors import FileNotFound
from inferfleet.tasks.files import FileRecord
from inferfleet.tasks.shelf import selected
from inferfleet.workers.api import openapi_files as docs
from inferfleet.workers.api.auth import Tenant
from inferfleet.workers.api.parameters import check_after, only_known_parameters, path_id, query_id
from inferfleet.workers.api.responses import json_response, page_response
from inferfleet.workers.api.services import Services, Use
from inferfleet.workers.api.upload import Upload, forget
from inferfleet.workers.api.waiting import CLIENT_LEFT

router = APIRouter(prefix="/v1/files", tags=["OpenAI"], dependencies=[Depends(only_known_parameters)])


def known_file(file_id: Annotated[str, path_id(files.FILE_ID.pattern)]) -> str:
    """An id that no file can have is not found, like any other that is not there."""
    if not files.FILE_ID.fullmatch(file_id):
        raise FileNotFound(param="file_id")
    return file_id


FileId = Annotated[str, Depends(known_file)]


@router.post("", openapi_extra=docs.CREATE_FILE)
async def create_file(request: Request, tenant: Tenant, use: Use) -> Response:
    """Upload a batch's input as a form: `file` and `purpose`, and if you like `expires_after[anchor]` and `[seconds]`.

    Sent again by the OpenAI SDK after a lost answer, or under the same Idempotency-Key, it is still one file.
    """
    try:
        closed = await Upload(use, tenant).receive(request)
    except ClientDisconnect:
        return Response(status_code=CLIENT_LEFT)
    record = await use.ledger.run(files.get_file(closed.file_id, tenant))
    headers = {"idempotency-replayed": "true"} if closed.replayed else {}
    return json_response(file_object(record), headers=headers)


@router.get("", openapi_extra=docs.LIST_FILES)
async def list_files(
    tenant: Tenant,
    use: Use,
    purpose: Annotated[str | None, Query(max_length=64, description="only files of this purpose")] = None,
    after: Annotated[str | None, query_id(files.FILE_ID.pattern)] = None,
    limit: Annotated[int, Query(ge=1, le=10_000, description="of which a page holds 1000 at most")] = 1000,
    order: Annotated[Literal["asc", "desc"], Query(description="by age; desc = newest first")] = "desc",
) -> Response:
    """The caller's files."""
    check_after(after, files.FILE_ID, FileNotFound)
    page = await use.ledger.run(files.list_files(tenant, purpose, after, min(limit, files.MAX_FILES_PAGE), order))
    return page_response([file_object(record) for record in page.files], page.has_more)


@router.get("/{file_id}", openapi_extra=docs.GET_FILE)
async def get_file(file_id: FileId, tenant: Tenant, use: Use) -> Response:
    """One file, without its content."""
    return json_response(file_object(await use.ledger.run(files.get_file(file_id, tenant))))


@router.get("/{file_id}/content", openapi_extra=docs.FILE_CONTENT)
async def file_content(file_id: FileId, tenant: Tenant, use: Use) -> Response:
    """The file itself. Its parts are checked against their digests on the way; a damaged one breaks the answer off."""
    record = await use.ledger.run(files.get_file(file_id, tenant))
    body = _content(use, record)
    first = await anext(body, b"")  # a store that is away is an error with a status, as long as nothing was sent
    headers = {
        "content-length": str(record.size),
        "content-disposition": f"attachment; filename*=UTF-8''{quote(record.filename)}",
    }
    return StreamingResponse(chained(first, body), headers=headers, media_type="application/octet-stream")


@router.delete("/{file_id}", openapi_extra=docs.DELETE_FILE)
async def delete_file(file_id: FileId, tenant: Tenant, use: Use) -> Response:
    """Forget a file. One that a batch still reads is refused."""
    dropped = await use.ledger.run(files.delete_file(file_id, tenant))
    await forget(use, dropped)
    return json_response({"id": file_id, "object": "file", "deleted": True})


def file_object(record: FileRecord) -> dict[str, Any]:
    """OpenAI's file object."""
    return {
        "id": record.id,
        "object": "file",
        "bytes": record.size,
        "created_at": record.created_ms // 1000,
        "expires_at": record.expires_ms // 1000,
        "filename": record.filename,
        "purpose": record.purpose,
        "status": "processed",
        "status_details": None,
    }


async def _content(use: Services, record: FileRecord) -> AsyncIterator[bytes]:
    for part in await use.ledger.run(files.parts_of(record.shelf)):
        data = selected(await use.store.get(part.key, part.sha256), record.kind)
        if data:
            yield data


async def chained(first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """A stream of which the first piece was asked for already."""
    yield first
    async for data in rest:
        yield data
