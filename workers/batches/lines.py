"""What a batch writes of a line that ended, in OpenAI's words. Pure."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Literal

from inferfleet.tasks import names
from inferfleet.tasks.batches import Line
from inferfleet.tasks.errors import from_dict
from inferfleet.tasks.shelf import marked

EXPIRED = ("batch_expired", "This request could not be executed before the completion window expired.")
CANCELLED = ("batch_cancelled", "This request was not executed because the batch was cancelled.")


def succeeded(
    batch_id: str, number: int, custom_id: str, job_id: str, body: bytes, usage: Mapping[str, Any] | None, keep: bool
) -> Line:
    """A line for the output file. `body` is JSON already; keep: its job is, since the body names pictures of it."""
    # In JSON a line feed can only stand between two words; in a file of lines it would end one.
    body = body.replace(b"\n", b" ")
    head = json.dumps({"status_code": 200, "request_id": names.request_id(job_id)})[:-1].encode()
    envelope = head_of(batch_id, number, custom_id)
    text = envelope + b', "response": ' + head + b', "body": ' + body + b'}, "error": null}'
    counted = tokens(usage or {})
    then: Literal["forget", "keep"] = "keep" if keep else "forget"
    return Line(number, marked(text, output=True), failed=False, job_id=job_id, job_then=then, **counted)


def refused(
    batch_id: str, number: int, custom_id: str, job_id: str, error: Mapping[str, Any], usage: Mapping[str, Any] | None
) -> Line:
    """A line that was tried and answered with an error, for the error file."""
    status = from_dict(error).status
    request = {"status_code": status, "request_id": names.request_id(job_id), "body": {"error": dict(error)}}
    text = head_of(batch_id, number, custom_id) + f', "response": {json.dumps(request)}, "error": null}}'.encode()
    return Line(
        number, marked(text, output=False), failed=True, job_id=job_id, job_then="forget", **tokens(usage or {})
    )


def not_run(batch_id: str, number: int, custom_id: str, why: tuple[str, str], job_id: str | None = None) -> Line:
    """A line that the batch's end came before, for the error file."""
    error = json.dumps({"code": why[0], "message": why[1]})
    text = head_of(batch_id, number, custom_id) + f', "response": null, "error": {error}}}'.encode()
    return Line(number, marked(text, output=False), failed=True, job_id=job_id, job_then="forget" if job_id else "")


def head_of(batch_id: str, number: int, custom_id: str) -> bytes:
    """The beginning of every line. Its id is made of the batch and the line, so it is the same for every runner."""
    digest = hashlib.sha256(f"{batch_id}:{number}".encode()).hexdigest()[:32]
    return json.dumps({"id": f"batch_req_{digest}", "custom_id": custom_id}, ensure_ascii=False)[:-1].encode()


def tokens(usage: Mapping[str, Any]) -> dict[str, int]:
    """Of a chat's or a picture's usage, in the words of the batch object."""
    details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details") or {}
    return {
        "input_tokens": usage.get("prompt_tokens", usage.get("input_tokens", 0)),
        "cached_tokens": details.get("cached_tokens", 0),
        "output_tokens": usage.get("completion_tokens", usage.get("output_tokens", 0)),
    }
