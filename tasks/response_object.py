"""OpenAI's response object: how a job of /v1/responses looks, before, while and after it is carried. Knows no Redis."""

from collections.abc import Mapping
from typing import Any, Literal

from inferfleet.tasks import names
from inferfleet.tasks.contracts import ResponseRequest
from inferfleet.tasks.errors import BY_CODE, JobFailed

Status = Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]

#: State of the job -> status of its response.
STATUSES: dict[str, Status] = {
    "queued": "queued",
    "in_progress": "in_progress",
    "cancelling": "in_progress",
    "completed": "completed",
    "incomplete": "incomplete",
    "failed": "failed",
    "expired": "failed",
    "cancelled": "cancelled",
}


def response_object(
    request: ResponseRequest,
    job_id: str,
    created_at: int,
    status: Status,
    *,
    text: str | None = None,
    usage: Mapping[str, Any] | None = None,
    error: Mapping[str, Any] | None = None,
    completed_at: int | None = None,
) -> dict[str, Any]:
    """Times in Unix seconds. text: what it says, where it has ended by itself. error: the job's."""
    cut = {"reason": "max_output_tokens"} if status == "incomplete" else None
    return {
        "id": names.response_id(job_id),
        "object": "response",
        "created_at": created_at,
        "status": status,
        "background": bool(request.background),
        "completed_at": completed_at,
        "error": None if error is None or status == "cancelled" else error_object(error),
        "incomplete_details": cut,
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "model": request.model,
        "output": [] if text is None else [message(job_id, text, "incomplete" if cut else "completed")],
        "parallel_tool_calls": False,
        "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None},
        "service_tier": request.service_tier or "default",
        "store": request.store is not False,
        "temperature": request.temperature,
        "text": {"format": {"type": "text"}},
        "tool_choice": "auto",
        "tools": [],
        "top_p": request.top_p,
        "truncation": "disabled",
        "usage": usage,
        "user": request.user,
        "metadata": request.metadata or {},
    }


def message(job_id: str, text: str, status: Literal["in_progress", "completed", "incomplete"]) -> dict[str, Any]:
    """The one item that a response gives."""
    return {
        "id": message_id(job_id),
        "type": "message",
        "status": status,
        "role": "assistant",
        "content": [text_part(text)] if status != "in_progress" else [],
    }


def text_part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def message_id(job_id: str) -> str:
    return f"msg_{job_id.removeprefix('job_')}"


def error_object(error: Mapping[str, Any]) -> dict[str, Any]:
    """A job's error in OpenAI's words; `type` is our own code."""
    kind = BY_CODE.get(str(error.get("code")), JobFailed)
    code = "server_error" if kind.status >= 500 else "invalid_prompt"
    return {"code": code, "message": error.get("message"), "type": error.get("code"), "param": error.get("param")}


def usage_object(input_tokens: int, cached_tokens: int, output_tokens: int) -> dict[str, Any]:
    return {
        "input_tokens": input_tokens,
        "input_tokens_details": {"cached_tokens": cached_tokens, "cache_write_tokens": 0},
        "output_tokens": output_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": input_tokens + output_tokens,
    }


def input_items(request: ResponseRequest, job_id: str) -> list[dict[str, Any]]:
    """What the response was asked with, in order."""
    return [
        {
            "id": message.id or f"{message_id(job_id)}_{number}",
            "type": "message",
            "status": "completed",
            "role": message.role,
            "content": [text_part(message.text)]
            if message.role == "assistant"
            else [{"type": "input_text", "text": message.text}],
        }
        for number, message in enumerate(request.messages)
    ]
