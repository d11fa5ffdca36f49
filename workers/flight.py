"""One claimed job on its way through an engine: what was said so far, what is still to publish, how it ended.

Knows no Redis and no process: the engine's side calls `absorb`, `finish` and `fail`, the publisher calls `outgoing` and
`published`, the turn waits for `ended`. The event log is the truth of what was published, so a flight starts from it.
"""

import hashlib
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from inferfleet.tasks import names

Event = dict[str, Any]

_MAX_SEED = 2**63 - 1


class Ending(Enum):
    """How a flight ended, as far as the engine and the ledger told."""

    #: The engine said all it had to say (also after a cancel: with partial usage).
    FINISHED = "finished"
    #: The engine refused or broke on this request; `Flight.error` says why.
    FAILED = "failed"
    #: The ledger gave the job to somebody else, or it is over: nothing may be written any more.
    STALE = "stale"
    #: The engine process died, or stood still too long, with the request in it.
    CRASHED = "crashed"
    #: Handed back without fault: the worker drains, or the request never reached an engine.
    RELEASED = "released"


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


@dataclass(frozen=True)
class Outgoing:
    """Events on their way to the log. Sent again after a doubt with the same token, so they land once."""

    token: str
    events: list[Event]


class Flight:
    """A job between claim and end. Its methods may be called from several threads."""

    def __init__(self, job_id: str, fence: int, model: str, *, published: Iterable[Mapping[str, Any]] = ()) -> None:
        self.job_id = job_id
        self.fence = fence
        self.model = model
        self.choices: dict[int, Choice] = {}
        for event in published:
            if event["type"] == names.DELTA:
                self._choice(event["index"]).extend(event)
        self.resumed_tokens = sum(len(choice.token_ids) for choice in self.choices.values())
        #: time.monotonic() of the claim and of the first token of this attempt.
        self.claimed_at = time.monotonic()
        self.first_at: float | None = None
        self.usage: dict[str, int] | None = None
        self.error: dict[str, Any] | None = None
        self.ending: Ending | None = None
        self.cancelled = False
        #: How many requests were in the engine when it died or stood still; 1 = this one is the culprit.
        self.num_crashed = 0
        #: The engine has said its last word about it.
        self.told = False
        #: Set when the engine is done with it, or nobody waits for the engine any more.
        self.ended = threading.Event()
        self._lock = threading.Lock()
        self._pending: list[Event] = []
        self._in_doubt: Outgoing | None = None
        self._num_sent = 0

    @property
    def engine_id(self) -> str:
        """The request's id inside an engine: a job that comes back meets no trace of its former self there."""
        return f"{self.job_id}.{self.fence}"

    @property
    def num_new_tokens(self) -> int:
        """Tokens that this flight added to what earlier attempts had published."""
        return sum(len(choice.token_ids) for choice in self.choices.values()) - self.resumed_tokens

    def resume(self) -> dict[str, Any]:
        """The engine's `resume`: choice index -> what was published of it."""
        return {str(index): choice.to_resume() for index, choice in self.choices.items()}

    def absorb(self, delta: Mapping[str, Any]) -> bool:
        """Take one delta of the engine; True when it is the first that this flight says."""
        event = {
            "type": names.DELTA,
            "index": delta["index"],
            "delta": delta["text"],
            "token_ids": delta["token_ids"],
            "logprobs": delta["logprobs"],
            "finish_reason": delta["finish_reason"],
        }
        with self._lock:
            first = self.first_at is None
            if first:
                self.first_at = time.monotonic()
            self._choice(event["index"]).extend(event)
            if not (self._pending and _merge(self._pending, event)):
                self._pending.append(event)
        return first

    def finish(self, usage: Mapping[str, int]) -> None:
        """The engine is done; the flight ends once everything is published (see `settled`)."""
        with self._lock:
            self.usage = dict(usage)
            self.told = True

    def end(self, ending: Ending, error: dict[str, Any] | None = None) -> bool:
        """End now. The first ending counts; answers whether this was it."""
        with self._lock:
            if self.ending is not None:
                return False
            self.ending, self.error = ending, error
        self.ended.set()
        return True

    def outgoing(self) -> Outgoing | None:
        """What to send to the log next: the batch in doubt again, else all that is pending."""
        with self._lock:
            if self._in_doubt is None and self._pending:
                self._num_sent += 1
                self._in_doubt = Outgoing(f"{self.fence}.{self._num_sent}", self._pending)
                self._pending = []
            return self._in_doubt

    def published(self) -> None:
        """The batch that `outgoing` gave is in the log."""
        with self._lock:
            self._in_doubt = None

    @property
    def settled(self) -> bool:
        """The engine is done and all it said is in the log."""
        with self._lock:
            return self.usage is not None and not self._pending and self._in_doubt is None

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


def seed_of(job_id: str) -> int:
    """The seed of a job that names none: the same on every attempt, so that a requeued job goes on as it began."""
    return int.from_bytes(hashlib.sha256(job_id.encode()).digest()[:8], "big") & _MAX_SEED
