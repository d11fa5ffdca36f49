"""A loaded model as the engine process serves it, whichever kind it is: requests come as messages, news go as they are.

What a message means is the matter of each kind: text_service.py, diffusion/service.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any, Generic, Protocol, TypeVar

from inferfleet.engine.diffusion.spec import DiffusionSpec
from inferfleet.engine.errors import EngineError
from inferfleet.engine.kind import find_spec
from inferfleet.engine.news import News
from inferfleet.engine.progress import Progress


class Engine(Protocol):
    """What both kinds of engine are asked."""

    num_steps: int

    @property
    def has_work(self) -> bool: ...

    def cancel(self, request_id: str) -> bool: ...

    def step(self) -> News[Any, Any]: ...

    def stats(self) -> dict[str, Any]: ...


E = TypeVar("E", bound=Engine)


class Service(ABC, Generic[E]):
    """One model: its engine, and the card that describes it."""

    def __init__(self, engine: E, card: dict[str, Any]) -> None:
        self.engine, self.card = engine, card

    @property
    def connections(self) -> Sequence[Connection]:
        """Sockets that break if a process that the model lives in does."""
        return ()

    def check(self) -> None:
        """Raises GroupBroken if one of them has."""

    @abstractmethod
    def add(self, message: Mapping[str, Any]) -> None:
        """Take a request. EngineError with the field at fault."""

    @abstractmethod
    def news(self, *errors: tuple[str, EngineError]) -> News[Any, Any]:
        """News of nothing but requests that were not taken."""


def load_service(values: Mapping[str, Any], progress: Progress, alive: Callable[[], None]) -> Service[Any]:
    """The model of a worker's settings. alive: called as steps go on that may take long. Raises LoadError, a ModelError
    and their like; each says what to do.
    """
    spec = find_spec(values, progress)
    # What the other kind needs is not even imported.
    if isinstance(spec, DiffusionSpec):
        from inferfleet.engine.diffusion.service import ImageService

        return ImageService.load(spec, progress, alive)
    from inferfleet.engine.text_service import TextService

    return TextService.load(spec, progress)
