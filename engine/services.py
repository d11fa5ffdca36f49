"""A loaded model as the engine process serves it, whichever kind it is: requests come as messages, news go as they are.

What a message means is the matter of each kind: text_service.py, diffusion/service.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any, Protocol

from inferfleet.engine.diffusion.spec import DiffusionSpec
from inferfleet.engine.errors import EngineError
from inferfleet.engine.kind import find_spec
from inferfleet.engine.progress import Progress


class News(Protocol):
    """What a step has to tell; true if there is something."""

    def __bool__(self) -> bool: ...

    @property
    def figures(self) -> dict[str, int]:
        """How much the step computed."""
        ...

    def to_dict(self) -> dict[str, Any]: ...


class Service(Protocol):
    """One model."""

    card: dict[str, Any]

    @property
    def has_work(self) -> bool: ...

    @property
    def num_steps(self) -> int: ...

    @property
    def connections(self) -> Sequence[Connection]:
        """Sockets that break if a process that the model lives in does."""
        ...

    def check(self) -> None:
        """Raises GroupBroken if one of them has."""
        ...

    def add(self, message: Mapping[str, Any]) -> None:
        """Take a request. EngineError with the field at fault."""
        ...

    def cancel(self, request_id: str) -> bool: ...

    def step(self) -> News: ...

    def news(self, *errors: tuple[str, EngineError]) -> News:
        """News of nothing but requests that were not taken."""
        ...

    def stats(self) -> dict[str, Any]:
        """What is going on now, and counts since the start."""
        ...


def load_service(values: Mapping[str, Any], progress: Progress, alive: Callable[[], None]) -> Service:
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
