"""Between the outside and the engine: a claimed job becomes a request, what it said becomes OpenAI's answer.

Knows both shapes and nothing else.
"""

import json
from collections.abc import Mapping
from typing import Any

from inferfleet.tasks.contracts import ChatCompletionRequest, JobRequest
from inferfleet.tasks.records import Claim
from inferfleet.workers.flight import Choice, Flight, seed_of


def read_envelope(claim: Claim) -> JobRequest:
    """The job as it was accepted. Raises pydantic's ValidationError if an older version wrote something else."""
    return JobRequest.model_validate_json(claim.envelope)


def engine_request(claim: Claim, job: JobRequest, flight: Flight) -> dict[str, Any]:
    """The fields of the engine's `add`, without its id."""
    body = job.body
    if not isinstance(body, ChatCompletionRequest):
        image = {"seed": seed_of(claim.job_id), **body.painting()}
        return {"priority": job.effective_priority, "image": image}
    template = body.chat_template_kwargs
    return {
        "messages": body.plain_messages(),
        "chat_template_kwargs": {} if template is None else template.model_dump(exclude_none=True),
        "sampling": {"seed": seed_of(claim.job_id), **body.sampling()},
        # Ours, from the tenant, never a client's text: cached prefixes are shared within a tenant only.
        "cache_salt": claim.tenant,
        "priority": job.effective_priority,
        "matformer_slice": body.matformer_slice,
        "resume": flight.resume(),
    }


def usage_of(flight: Flight) -> dict[str, Any]:
    """OpenAI's usage object. Of a request that was stopped before it reached the engine only the tokens that earlier
    attempts published are known; the rest is zero."""
    usage = flight.usage or {}
    prompt, completion = usage.get("prompt_tokens", 0), usage.get("completion_tokens", flight.resumed_tokens)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": usage.get("cached_tokens", 0)},
    }


def completion_id(job_id: str) -> str:
    """The id of the chat completion that a job makes, in its body and in its stream."""
    return f"chatcmpl-{job_id.removeprefix('job_')}"


def completion(flight: Flight, created: int) -> dict[str, Any]:
    """OpenAI's chat.completion object; `created` in Unix seconds."""
    return {
        "id": completion_id(flight.job_id),
        "object": "chat.completion",
        "created": created,
        "model": flight.model,
        "choices": [choice_object(index, choice) for index, choice in sorted(flight.choices.items())],
        "usage": usage_of(flight),
    }


def choice_object(index: int, choice: Choice) -> dict[str, Any]:
    logprobs = None if choice.logprobs is None else {"content": choice.logprobs, "refusal": None}
    return {
        "index": index,
        "message": {"role": "assistant", "content": choice.text, "refusal": None},
        "logprobs": logprobs,
        "finish_reason": choice.finish_reason,
    }


def to_bytes(body: Mapping[str, Any]) -> bytes:
    return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()
