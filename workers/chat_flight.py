"""A chat on its way through an engine: what each of its answers says so far.

The event log is the truth of what was published, so a flight starts from it and the engine goes on after it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from inferfleet.tasks import names
from inferfleet.workers.flight import Event, Flight


@dataclass
class Choice:
    """One of a job's n answers, as far as it got."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[dict[str, Any]] | None = None
    finish_reason: str | None = None

    def extend(self, piece: Mapping[str, Any]) -> None:
        self.token_ids.extend(piece["token_ids"])
        self.text += piece["delta"]
        if piece["logprobs"] is not None:
            self.logprobs = (self.logprobs or []) + piece["logprobs"]
        self.finish_reason = piece.get("finish_reason") or self.finish_reason

    def to_resume(self) -> dict[str, Any]:
        """What the engine needs to go on after it."""
        return {"token_ids": self.token_ids, "text": self.text, "finish_reason": self.finish_reason}


class ChatFlight(Flight):
    """A chat between claim and end."""

    def __init__(self, job_id: str, fence: int, model: str, *, published: Iterable[Mapping[str, Any]] = ()) -> None:
        super().__init__(job_id, fence, model)
        self.choices: dict[int, Choice] = {}
        for event in published:
            if event["type"] == names.DELTA:
                self._choice(event["index"]).extend(event)
        self.resumed_tokens = sum(len(choice.token_ids) for choice in self.choices.values())

    def absorb(self, delta: Mapping[str, Any]) -> bool:
        """One delta of text; True for the first that this flight says."""
        event = {
            "type": names.DELTA,
            "index": delta["index"],
            "delta": delta["text"],
            "token_ids": delta["token_ids"],
            "logprobs": delta["logprobs"],
            "finish_reason": delta["finish_reason"],
        }
        with self._lock:
            first = self._is_first()
            self._choice(event["index"]).extend(event)
            if not (self._pending and _merge(self._pending, event)):
                self._pending.append(event)
        return first

    @property
    def num_prompt_tokens(self) -> int:
        return (self.usage or {}).get("prompt_tokens", 0)

    @property
    def num_new_tokens(self) -> int:
        return sum(len(choice.token_ids) for choice in self.choices.values()) - self.resumed_tokens

    @property
    def finish_reasons(self) -> Sequence[str]:
        return [choice.finish_reason or "" for choice in self.choices.values()]

    @property
    def first_token_at(self) -> float | None:
        return None if self.resumed_tokens else self.first_at

    def resume(self) -> dict[str, Any]:
        """The engine's `resume`: choice index -> what was published of it."""
        return {str(index): choice.to_resume() for index, choice in self.choices.items()}

    def _choice(self, index: int) -> Choice:
        return self.choices.setdefault(index, Choice())


def _merge(pending: list[Event], event: Event) -> bool:
    """Append to the last pending event of the same choice, so that one flush writes one event a choice."""
    for earlier in reversed(pending):
        if earlier["index"] == event["index"]:
            earlier["delta"] += event["delta"]
            earlier["token_ids"] = earlier["token_ids"] + event["token_ids"]
            if event["logprobs"] is not None:
                earlier["logprobs"] = (earlier["logprobs"] or []) + event["logprobs"]
            earlier["finish_reason"] = event["finish_reason"] or earlier["finish_reason"]
            return True
    return False
