"""The OpenAPI document as a whole: what FastAPI cannot know of routes that read raw bytes, and links between them."""

from collections.abc import Iterator
from typing import Any

from fastapi import FastAPI

from inferfleet.workers.api import openapi_dead, openapi_files, openapi_webhooks
from inferfleet.workers.api.openapi import ErrorAnswer, components, ref

OF_JOBS = ("get_job", "job_events", "job_result", "cancel_job", "update_job", "retry_job", "delete_job")
OF_RESPONSES = ("get_response", "list_input_items", "cancel_response", "delete_response")
OF_FILES = ("get_file", "file_content", "delete_file")
OF_BATCHES = ("get_batch", "batch_results", "cancel_batch", "retry_batch")
OF_ENDPOINTS = ("get_endpoint", "update_endpoint", "rotate_secret", "test_endpoint", "delete_endpoint")
#: Operation -> the parameter that its answer's id is of other operations.
LINKS: dict[str, tuple[str, tuple[str, ...]]] = {
    "create_job": ("job_id", OF_JOBS),
    "put_job": ("job_id", OF_JOBS),
    "create_response": ("response_id", OF_RESPONSES),
    "create_file": ("file_id", OF_FILES),
    "create_batch": ("batch_id", OF_BATCHES),
    "retry_batch": ("batch_id", OF_BATCHES),
    "create_endpoint": ("endpoint_id", OF_ENDPOINTS),
}
#: What a signed url opens too.
SIGNED = ("get_output",)


def describe(app: FastAPI, *, keys_required: bool) -> None:
    """Makes `app.openapi` give the whole document."""
    generate = app.openapi

    def whole() -> dict[str, Any]:
        document = generate()
        schemas = components(*openapi_dead.MODELS, *openapi_files.MODELS, *openapi_webhooks.MODELS)
        known = document.setdefault("components", {}).setdefault("schemas", {})
        known.update(schemas | openapi_files.forms(schemas))
        for name in ("HTTPValidationError", "ValidationError"):
            known.pop(name, None)
        for operation in operations(document):
            _refuse_in_our_shape(operation)
            _link(operation)
            if "security" in operation and (operation["operationId"] in SIGNED or not keys_required):
                operation["security"] = [{}, *(each for each in operation["security"] if each)]
        return document

    app.openapi = whole  # type: ignore[method-assign]


def operations(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for methods in document["paths"].values():
        yield from methods.values()


def _refuse_in_our_shape(operation: dict[str, Any]) -> None:
    """FastAPI writes its own shape of a 422 wherever a route has parameters."""
    found = operation["responses"].get("422")
    if found is not None:
        found["content"] = {"application/json": {"schema": ref(ErrorAnswer)}}
        found["description"] = "a field is wrong: `param` names it"


def _link(operation: dict[str, Any]) -> None:
    if operation["operationId"] not in LINKS:
        return
    parameter, targets = LINKS[operation["operationId"]]
    links = {name: {"operationId": name, "parameters": {parameter: "$response.body#/id"}} for name in targets}
    for status, answer in operation["responses"].items():
        if status.startswith("2"):
            answer["links"] = links
