"""The part of the OpenAPI document that is about files and batches."""

from typing import Any

from pydantic import BaseModel

from inferfleet.tasks.batches import Status
from inferfleet.tasks.contracts.batches import BatchRequest, ExpiresAfter, FileFields, RetryRequest
from inferfleet.workers.api.openapi import BODY_ERRORS, answer, answers, body, key_header, ref

FORM = "FileForm"
KEY = key_header("object")


class FileAnswer(BaseModel):
    """OpenAI's file."""

    id: str
    object: str
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: str
    status: str
    status_details: str | None


class FilePageAnswer(BaseModel):
    object: str
    data: list[FileAnswer]
    first_id: str | None
    last_id: str | None
    has_more: bool


class BatchError(BaseModel):
    """Why an input file was refused; `line` counts from 1."""

    code: str
    line: int | None
    message: str
    param: str | None


class BatchErrors(BaseModel):
    object: str
    data: list[BatchError]


class BatchCounts(BaseModel):
    """Lines of the input, of the output file and of the error file."""

    total: int
    completed: int
    failed: int


class BatchFacts(BaseModel):
    """What is not OpenAI's: the priority among batches, the batch whose failed lines this one runs again, and the
    places in buckets: of its input, and of its files or why these could not be written."""

    priority: int
    retry_of: str | None
    input_url: str | None
    output_url_prefix: str | None
    output_url: str | None
    error_url: str | None
    output_problem: str | None


class BatchAnswer(BaseModel):
    """OpenAI's batch."""

    id: str
    object: str
    endpoint: str
    model: str | None
    errors: BatchErrors | None
    input_file_id: str
    completion_window: str
    status: Status
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    expires_at: int
    in_progress_at: int | None
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: BatchCounts
    usage: dict[str, Any]
    metadata: dict[str, str] | None
    x_fleet: BatchFacts


class BatchPageAnswer(BaseModel):
    object: str
    data: list[BatchAnswer]
    first_id: str | None
    last_id: str | None
    has_more: bool


MODELS: tuple[type[BaseModel], ...] = (
    FileFields, FileAnswer, FilePageAnswer, BatchRequest, RetryRequest, BatchAnswer, BatchPageAnswer,
)  # fmt: skip


def forms(schemas: dict[str, Any]) -> dict[str, Any]:
    """The schemas of forms, from those of their text fields."""
    fields = schemas[FileFields.__name__]
    expiry = schemas[ExpiresAfter.__name__]["properties"]
    anchor, seconds = (f"expires_after[{name}]" for name in ("anchor", "seconds"))
    properties = {
        "purpose": fields["properties"]["purpose"],
        anchor: expiry["anchor"],
        seconds: expiry["seconds"],
        "file": {"type": "string", "format": "binary", "minLength": 1},
    }
    both = {anchor: [seconds], seconds: [anchor]}
    form = {**fields, "title": FORM, "description": "An upload.", "properties": properties, "dependentRequired": both}
    return {FORM: {**form, "required": [*fields["required"], "file"]}}


CREATE_FILE = {
    "requestBody": {"required": True, "content": {"multipart/form-data": {"schema": ref(FORM)}}},
    "parameters": [KEY],
} | answers({"200": answer("the file", FileAnswer)}, *BODY_ERRORS, 409)
LIST_FILES = answers({"200": answer("one page", FilePageAnswer)}, 404, 422)
GET_FILE = answers({"200": answer("the file", FileAnswer)}, 404)
FILE_CONTENT = answers(
    {
        "200": {
            "description": "the file's bytes",
            "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
        }
    },
    404,
)
DELETE_FILE = answers({"200": {"description": "gone"}}, 404, 409)
_BATCH = answer("the batch", BatchAnswer)
CREATE_BATCH = body(BatchRequest) | {"parameters": [KEY]} | answers({"200": _BATCH}, *BODY_ERRORS, 404, 409)
LIST_BATCHES = answers({"200": answer("one page", BatchPageAnswer)}, 404, 422)
GET_BATCH = answers({"200": _BATCH}, 404)
CANCEL_BATCH = answers({"200": answer("the batch, cancelling or cancelled", BatchAnswer)}, 404, 409)
RETRY_BATCH = (
    body(RetryRequest)
    | {"parameters": [KEY]}
    | answers({"200": answer("the new batch", BatchAnswer)}, *BODY_ERRORS, 404, 409)
)
RESULTS = answers({"200": answer("lines as JSON, one each", media="application/x-ndjson")}, 404, 422)
