"""How far the loading of models is: for the log, for a terminal, for the fleet. Knows no engine and no Redis.

An engine tells a phase with the bytes done and in all, or zeros where a phase has no measure.
"""

import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

from inferfleet.workers import logs

if TYPE_CHECKING:
    from rich.console import Console

#: A log or a pipe gets a line at each phase, and no more than one in so many seconds within it.
LINE_SECONDS = 5.0
UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")

log = logs.get("host")


@dataclass(frozen=True, slots=True)
class Loading:
    """Where one model stands."""

    phase: str
    done: int = 0
    total: int = 0

    @classmethod
    def of(cls, message: Mapping[str, Any]) -> "Loading":
        """As a process told it. Raises KeyError, TypeError or ValueError for what makes no sense."""
        return cls(str(message["phase"])[:40], int(message["done"]), int(message["total"]))

    @property
    def percent(self) -> int | None:
        """None where the phase has no measure."""
        return min(100, 100 * self.done // self.total) if self.total > 0 else None

    def to_dict(self) -> dict[str, Any]:
        """As cards and logs carry it."""
        return asdict(self) | ({} if self.percent is None else {"percent": self.percent})

    def __str__(self) -> str:
        if self.percent is None:
            return self.phase
        return f"{self.phase} {in_units(self.done)} of {in_units(self.total)} ({self.percent}%)"


class View(Protocol):
    """Whoever is shown it. Methods may be called from any thread."""

    def show(self, model: str, loading: Loading) -> None:
        """A model is on its way."""

    def end(self, model: str) -> None:
        """It has arrived, or never will."""


class LogView:
    """A log event at each phase, and now and then within it."""

    def __init__(self) -> None:
        self._told: dict[str, tuple[str, float]] = {}

    def show(self, model: str, loading: Loading) -> None:
        if is_due(self._told, model, loading.phase, LINE_SECONDS):
            log.info("model_loading", model=model, **loading.to_dict())

    def end(self, model: str) -> None:
        self._told.pop(model, None)


class BarView:
    """A bar for each model, below the lines that others print meanwhile; gone when all have arrived."""

    def __init__(self, console: "Console") -> None:
        self._console = console
        self._lock = threading.Lock()
        self._bars: Any = None
        self._tasks: dict[str, Any] = {}

    def show(self, model: str, loading: Loading) -> None:
        with self._lock:
            if self._bars is None:
                self._bars = _bars(self._console)
                self._bars.start()
            if model not in self._tasks:
                self._tasks[model] = self._bars.add_task(model, total=None, phase="")
            task, total = self._tasks[model], loading.total or None
            self._bars.update(task, completed=loading.done, total=total, phase=str(loading))

    def end(self, model: str) -> None:
        with self._lock:
            if (task := self._tasks.pop(model, None)) is not None:
                self._bars.remove_task(task)
            if not self._tasks and self._bars is not None:
                self._bars.stop()
                self._bars = None


def view_for(log_format: str) -> View:
    """Bars where a person reads the log on a terminal, else events in it."""
    if log_format == "json" or not sys.stderr.isatty():
        return LogView()
    # Imported here: most workers have no terminal.
    from rich.console import Console

    return BarView(Console(stderr=True))


def is_due(told: dict[str, tuple[str, float]], model: str, phase: str, seconds: float) -> bool:
    """Whether it is time for a word about a model, which `told` then remembers: another phase, or seconds later."""
    now = time.monotonic()
    before = told.get(model)
    if before is not None and before[0] == phase and now - before[1] < seconds:
        return False
    told[model] = (phase, now)
    return True


def in_units(size: float) -> str:
    """A number of bytes for a person: `48 KiB`, `12.3 GiB`."""
    unit = 0
    while abs(size) >= 1024 and unit < len(UNITS) - 1:
        size, unit = size / 1024, unit + 1
    text = f"{size:.1f}".removesuffix(".0") if unit else f"{size:.0f}"
    return f"{text} {UNITS[unit]}"


def _bars(console: "Console") -> Any:
    from rich.progress import BarColumn, Progress, TextColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TextColumn("{task.fields[phase]}"))
    return Progress(*columns, console=console, transient=True)
