"""Answers that every route shares: JSON, the one error shape and its headers."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from starlette.responses import Response

from inferfleet.tasks.errors import (
    BodyTooLarge,
    Conflict,
    FleetError,
    InvalidRequest,
    JobFailed,
    ReceiverFailed,
    RequestTimeout,
    Unauthorized,
)
from inferfleet.workers.api.sse import compact

#: Repeating these changes nothing: the OpenAI SDK retries 409 and 5xx unless told not to.
FINAL = (Conflict, InvalidRequest, JobFailed, ReceiverFailed)


def json_response(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """`value` as JSON, without a second pass through FastAPI's encoder."""
    return Response(compact(value), status_code=status, headers=headers, media_type="application/json")


def page_response(data: Sequence[Mapping[str, Any]], has_more: bool) -> Response:
    """OpenAI's page of objects that have an id."""
    ends = {"first_id": data[0]["id"] if data else None, "last_id": data[-1]["id"] if data else None}
    return json_response({"object": "list", "data": data, **ends, "has_more": has_more})


def error_response(error: FleetError, headers: Mapping[str, str] | None = None) -> Response:
    """`{"error": {"message", "type", "param", "code"}}` with the status and the retry headers of the error."""
    return json_response({"error": error.to_dict()}, error.status, {**error_headers(error), **(headers or {})})


def error_headers(error: FleetError) -> dict[str, str]:
    """What a client must know before it tries again."""
    headers: dict[str, str] = {}
    if error.retry_after is not None:
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after)))
        headers["retry-after-ms"] = str(max(1, math.ceil(error.retry_after * 1000)))
    if isinstance(error, FINAL):
        headers["x-should-retry"] = "false"
    if isinstance(error, Unauthorized):
        headers["www-authenticate"] = "Bearer"
    if isinstance(error, BodyTooLarge | RequestTimeout):
        headers["connection"] = "close"  # the rest of the body is still on its way: this connection is of no more use
    return headers
