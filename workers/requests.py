"""Between the outside and the engine: a claimed job becomes an errand, what a chat said becomes OpenAI's answer.

Knows both shapes and nothing else. Image jobs have theirs in pictures.py.
"""

import json
import time
from collections.abc import Mapping
from typing import Any

from inferfleet.tasks.contracts import ChatCompletionRequest, JobRequest, ResponseRequest
from inferfleet.tasks.names import State
from inferfleet.tasks.records import Claim
from inferfleet.tasks.response_object import Status, response_object, usage_object
from inferfleet.workers.chat_flight import ChatFlight, Choice
from inferfleet.workers.errand import Card, Errand
from inferfleet.workers.flight import seed_of


def read_envelope(claim: Claim) -> JobRequest:
    """The job as it was accepted. Raises pydantic's ValidationError if an older version wrote something else."""
    return JobRequest.model_validate_json(claim.envelope)


class ChatErrand(Errand):
    """A chat."""

    def __init__(self, claim: Claim, job: JobRequest, card: Card, body: ChatCompletionRequest) -> None:
        super().__init__(claim, job, card)
        self._body = body
        self._flight = ChatFlight(claim.job_id, claim.fence, body.model, published=claim.published)

    @property
    def flight(self) -> ChatFlight:
        return self._flight

    def request(self) -> dict[str, Any]:
        template = self._body.chat_template_kwargs
        return {
            "messages": self._body.plain_messages(),
            "chat_template_kwargs": {} if template is None else template.model_dump(exclude_none=True),
            "sampling": {"seed": seed_of(self.claim.job_id), **self._body.sampling()},
            # Ours, from the tenant, never a client's text: cached prefixes are shared within a tenant only.
            "cache_salt": self.claim.tenant,
            "priority": self.priority,
            "matformer_slice": self._body.matformer_slice,
            "resume": self._flight.resume(),
        }

    def usage(self) -> dict[str, Any]:
        return usage_of(self._flight)

    def answer(self) -> dict[str, Any]:
        return completion(self._flight, created=self.claim.created_ms // 1000)


class ResponseErrand(ChatErrand):
    """A response: carried as a chat, answered as OpenAI's response object."""

    def __init__(self, claim: Claim, job: JobRequest, card: Card, body: ResponseRequest) -> None:
        super().__init__(claim, job, card, body.chat())
        self._asked = body

    @property
    def state(self) -> State:
        """An answer that was cut ends its job as incomplete."""
        cut = any(choice.finish_reason == "length" for choice in self.flight.choices.values())
        return "incomplete" if cut else "completed"

    def usage(self) -> dict[str, Any]:
        usage = super().usage()
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        return usage_object(usage["prompt_tokens"], cached, usage["completion_tokens"])

    def answer(self) -> dict[str, Any]:
        status: Status = "incomplete" if self.state == "incomplete" else "completed"
        text = "".join(choice.text for choice in self.flight.choices.values())
        # By the ledger's clock, which the claim told, not by this machine's.
        now = self.claim.now_ms / 1000 + time.monotonic() - self.flight.claimed_at
        return response_object(
            self._asked,
            self.claim.job_id,
            self.claim.created_ms // 1000,
            status,
            text=text,
            usage=self.usage(),
            completed_at=int(now),
        )


def usage_of(flight: ChatFlight) -> dict[str, Any]:
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


def completion(flight: ChatFlight, created: int) -> dict[str, Any]:
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
