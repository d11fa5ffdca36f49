"""What an engine tells its caller after a step, whatever kind of engine it is. Plain data; `to_dict` is its form on the
wire."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from inferfleet.engine.errors import EngineError


class Told(Protocol):
    """A part of the news."""

    def to_dict(self) -> dict[str, Any]: ...


D = TypeVar("D", bound=Told)
U = TypeVar("U", bound=Told)


@dataclass(slots=True)
class News(ABC, Generic[D, U]):
    """One step's news; `finished` (with what was used) and `errors` name each id once, and never both."""

    deltas: list[D] = field(default_factory=list)
    finished: list[tuple[str, U]] = field(default_factory=list)
    errors: list[tuple[str, EngineError]] = field(default_factory=list)

    def __bool__(self) -> bool:
        """True if there is something to tell."""
        return bool(self.deltas or self.finished or self.errors)

    @property
    @abstractmethod
    def figures(self) -> dict[str, int]:
        """How much the step computed."""

    def to_dict(self) -> dict[str, Any]:
        return {
            "deltas": [delta.to_dict() for delta in self.deltas],
            "finished": [{"id": id, "usage": usage.to_dict()} for id, usage in self.finished],
            "errors": [
                {"id": id, "code": error.code, "message": error.message, "param": error.param}
                for id, error in self.errors
            ],
        }
