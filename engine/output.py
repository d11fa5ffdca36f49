"""What the engine tells its caller after a step. Plain data; `to_dict` is its form on the wire."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from inferfleet.engine.errors import EngineError
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
class StepOutput:
    """One step's news; `finished` and `errors` name each id once, and never both."""

    deltas: list[Delta] = field(default_factory=list)
    finished: list[tuple[str, Usage]] = field(default_factory=list)
    errors: list[tuple[str, EngineError]] = field(default_factory=list)
    #: Tokens that the step computed.
    batch_tokens: int = 0

    def __bool__(self) -> bool:
        """True if there is something to tell."""
        return bool(self.deltas or self.finished or self.errors)

    @property
    def figures(self) -> dict[str, int]:
        """How much the step computed."""
        return {"batch_tokens": self.batch_tokens}

    def to_dict(self) -> dict[str, Any]:
        return {
            "deltas": [delta.to_dict() for delta in self.deltas],
            "finished": [{"id": id, "usage": usage.to_dict()} for id, usage in self.finished],
            "errors": [
                {"id": id, "code": error.code, "message": error.message, "param": error.param}
                for id, error in self.errors
            ],
        }
