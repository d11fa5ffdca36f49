"""Says where the loading of a model stands: which phase, and how much of it is done. Knows not to whom.

find      look for the files           download  fetch them: bytes
read      fill the weights: bytes      engine    cache, tokenizer, scheduler      smoke  the first forward passes
measure   paint pictures with exact and with coded weights, to see what the codes cost
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

#: tell(phase, done, total): bytes, or zeros where a phase has no measure.
Tell = Callable[[str, int, int], None]
#: Within a phase there is no more than one word in so many seconds.
SECONDS = 0.25


class Progress:
    """Of one model. May be called from any thread; `tell` is called from one at a time."""

    def __init__(self, tell: Tell = lambda phase, done, total: None, *, seconds: float = SECONDS) -> None:
        self._tell = tell
        self._seconds = seconds
        self._lock = threading.Lock()
        self._phase, self._done, self._total = "", 0, 0
        self._told: tuple[str, int, int] | None = None
        self._told_at = 0.0

    def begin(self, phase: str, total: int = 0) -> None:
        """A phase of so many bytes begins; the one before has come to its end."""
        with self._lock:
            self._finish()
            self._phase, self._done, self._total = phase, 0, total
            self._say()

    def at(self, done: int, total: int) -> None:
        """So much of the phase is done, as somebody else counts it."""
        with self._lock:
            self._done, self._total = done, total
            self._say_in_time()

    def counted(self, weights: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
        """The same tensors (or whatever else has nbytes), their bytes counted as they are taken; none is held on to."""
        for name, tensor in weights:
            size = tensor.nbytes
            yield name, tensor
            del tensor
            with self._lock:
                self._done = min(self._done + size, self._total)
                self._say_in_time()

    def _finish(self) -> None:
        # What was left are headers and what rounding left out.
        self._done = self._total
        if self._total and self._told != (self._phase, self._done, self._total):
            self._say()

    def _say_in_time(self) -> None:
        if time.monotonic() - self._told_at >= self._seconds:
            self._say()

    def _say(self) -> None:
        self._told, self._told_at = (self._phase, self._done, self._total), time.monotonic()
        self._tell(*self._told)
