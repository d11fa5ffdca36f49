"""What the engine tells its caller after a step. Plain data; `to_dict` is its form on the wire."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from inferfleet.engine.news import News
from inferfleet.engine.request import Request


@dataclass(slots=True)
class Delta:
    """News of one answer: its new tokens, the text that became certain, and how it ended, if it did."""

    id: str
    index: int
    token_ids: list[int]
    text: str
    #: OpenAI's entries, one for each new token, or None where nobody asked.
    logprobs: list[dict[str, Any]] | None = None
    #: "stop", "length", "cancelled", or None while the answer goes on.
    finish_reason: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "index": self.index,
            "token_ids": self.token_ids,
            "text": self.text,
            "logprobs": self.logprobs,
            "finish_reason": self.finish_reason,
        }


@dataclass(slots=True)
class Usage:
    """Tokens of all answers of one id; cached_tokens of the prompt came from the prefix cache."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int

    @classmethod
    def of(cls, requests: Sequence[Request]) -> Usage:
        """Of all answers of one id; the prompt, and what the cache gave of it, count once."""
        first = requests[0]
        completion = sum(len(request.output_token_ids) for request in requests)
        return cls(first.num_prompt_tokens, completion, first.num_cached_tokens or 0)

    def to_dict(self) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "cached_tokens": self.cached_tokens,
        }


@dataclass(slots=True)
class StepOutput(News[Delta, Usage]):
    """News of texts."""

    #: Tokens that the step computed.
    batch_tokens: int = 0

    @property
    def figures(self) -> dict[str, int]:
        return {"batch_tokens": self.batch_tokens}
