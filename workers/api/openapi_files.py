"""The part of the OpenAPI document that is about files and batches."""

from typing import Any

from pydantic import BaseModel

from inferfleet.tasks.contracts.batches import FileFields
from inferfleet.workers.api.openapi import answer, answers, header, ref

FORM = "FileForm"
KEY = header("Idempotency-Key", "1 to 255 printable characters; the same key and body give the same object")
_BODY_ERRORS = (400, 413, 415, 422)


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


MODELS: tuple[type[BaseModel], ...] = (FileFields, FileAnswer, FilePageAnswer)


def forms(schemas: dict[str, Any]) -> dict[str, Any]:
    """The schemas of forms, from those of their text fields."""
    fields = schemas[FileFields.__name__]
    properties = {**fields["properties"], "file": {"type": "string", "format": "binary"}}
    text = "An upload; expires_after is written as expires_after[anchor] and expires_after[seconds]."
    form = {**fields, "title": FORM, "description": text, "properties": properties}
    return {FORM: {**form, "required": [*fields["required"], "file"]}}


CREATE_FILE = {
    "requestBody": {"required": True, "content": {"multipart/form-data": {"schema": ref(FORM)}}},
    "parameters": [KEY],
} | answers({"200": answer("the file", FileAnswer)}, *_BODY_ERRORS, 409)
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
