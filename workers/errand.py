"""A claimed job that this worker carries: its flight, what its engine is asked for, and what is answered in the end.

There is a kind for each kind of body: ChatErrand, ResponseErrand, ImageErrand.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from inferfleet.tasks.contracts import JobRequest
from inferfleet.tasks.names import State
from inferfleet.tasks.records import Claim, Output
from inferfleet.workers.flight import Flight

#: What the engine said about its model.
Card = Mapping[str, Any]


class Errand(ABC):
    """One attempt at a job. It does not hold the job as it was submitted, in which there may be a large picture."""

    def __init__(self, claim: Claim, job: JobRequest, card: Card) -> None:
        self.claim = replace(claim, envelope=b"")
        self.priority = claim.priority
        self.execution_timeout = job.execution_timeout
        self.card = card

    @property
    @abstractmethod
    def flight(self) -> Flight:
        """How it goes."""

    @property
    def weight(self) -> int:
        """How many seats it fills: see Seats."""
        return 1

    @property
    def state(self) -> State:
        """What its job ends as when its engine has said all."""
        return "completed"

    @abstractmethod
    def request(self) -> dict[str, Any]:
        """The fields of the engine's `add`, without its id; asked for once. InvalidRequest for what only now shows."""

    @abstractmethod
    def usage(self) -> dict[str, Any]:
        """OpenAI's usage object, as far as the engine got."""

    @abstractmethod
    def answer(self) -> dict[str, Any]:
        """The body of a completed job. Raises EngineError if the engine said less than it should have."""

    def outputs(self) -> Sequence[Output]:
        """The files that it made, which are in the store."""
        return ()

    def discard(self) -> None:  # noqa: B027 - most kinds store nothing
        """The job did not complete by this attempt: nothing that it stored is needed."""
