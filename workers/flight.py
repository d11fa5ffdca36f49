"""One claimed job on its way through an engine: what is still to publish, and how it ended.

Knows no Redis and no process: the engine's side calls `absorb`, `finish` and `end`, the publisher calls `outgoing` and
`published`, the turn waits for `ended`. What an engine says of a job depends on its kind: see ChatFlight, ImageFlight.
"""

import hashlib
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

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


@dataclass(frozen=True)
class Outgoing:
    """Events on their way to the log. Sent again after a doubt with the same token, so they land once."""

    token: str
    events: list[Event]
    #: The token before it.
    behind: str


class Flight(ABC):
    """A job between claim and end. Its methods may be called from several threads."""

    def __init__(self, job_id: str, fence: int, model: str) -> None:
        self.job_id = job_id
        self.fence = fence
        self.model = model
        #: Tokens of its answers that earlier attempts published.
        self.resumed_tokens = 0
        #: time.monotonic() of the claim, and of the first thing that the engine said in this attempt.
        self.claimed_at = time.monotonic()
        self.first_at: float | None = None
        self.usage: dict[str, int] | None = None
        self.error: dict[str, Any] | None = None
        self.ending: Ending | None = None
        self.cancelled = False
        #: How many requests were in the engine when it died or stood still; 1 = this one is the culprit.
        self.num_crashed = 0
        #: How it died or that it stood still, in words.
        self.crash_reason = ""
        #: The engine has said its last word about it.
        self.told = False
        #: The worker is preparing the request, so no engine can be blamed for the time that this takes.
        self.preparing = False
        #: Set when the engine is done with it, or nobody waits for the engine any more.
        self.ended = threading.Event()
        self._lock = threading.Lock()
        self._pending: list[Event] = []
        self._in_doubt: Outgoing | None = None
        self._num_sent = 0
        #: Of what is known to be in the log.
        self._last_token = ""

    @abstractmethod
    def absorb(self, delta: Mapping[str, Any]) -> bool:
        """Take one delta of the engine; True when it should be published at once, not with the next flush."""

    @property
    @abstractmethod
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt, once the engine has told."""

    @property
    def num_new_tokens(self) -> int:
        """Tokens of text that this flight added to what earlier attempts had published."""
        return 0

    @property
    def num_pictures_made(self) -> int:
        """Pictures that are in the store."""
        return 0

    @property
    def num_steps(self) -> int:
        """Denoising steps of this attempt, over all its pictures."""
        return 0

    @property
    def finish_reasons(self) -> Sequence[str]:
        """Why each of its answers ended."""
        return ()

    @property
    def first_token_at(self) -> float | None:
        """time.monotonic() of its first token, where that is the job's first."""
        return None

    @property
    def engine_id(self) -> str:
        """The request's id inside an engine: a job that comes back meets no trace of its former self there."""
        return f"{self.job_id}.{self.fence}"

    @property
    def in_our_hands(self) -> bool:
        """Whether it waits for this worker and not for the engine: its lease is ours to renew, whatever that does."""
        return self.preparing or self.told

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
                self._in_doubt = Outgoing(f"{self.fence}.{self._num_sent}", self._pending, self._last_token)
                self._pending = []
            return self._in_doubt

    def published(self) -> None:
        """The batch that `outgoing` gave is in the log."""
        with self._lock:
            if self._in_doubt is not None:
                self._last_token, self._in_doubt = self._in_doubt.token, None

    @property
    def last_token(self) -> str:
        """Of what this flight published last; '' before that."""
        with self._lock:
            return self._last_token

    @property
    def has_news(self) -> bool:
        """Whether there is something to publish."""
        with self._lock:
            return bool(self._pending) or self._in_doubt is not None

    @property
    def settled(self) -> bool:
        """The engine is done and all it said is where it belongs."""
        with self._lock:
            return self._is_settled()

    def _is_settled(self) -> bool:
        """Called with the lock held."""
        return self.usage is not None and not self._pending and self._in_doubt is None

    def _is_first(self) -> bool:
        """Notes the time of the engine's first word. Called with the lock held."""
        first = self.first_at is None
        if first:
            self.first_at = time.monotonic()
        return first


def seed_of(job_id: str) -> int:
    """The seed of a job that names none: the same on every attempt, so that a requeued job goes on as it began."""
    return int.from_bytes(hashlib.sha256(job_id.encode()).digest()[:8], "big") & _MAX_SEED
