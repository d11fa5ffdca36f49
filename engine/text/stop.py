"""Stop strings in a text that arrives in pieces: nothing of a stop string is ever given out.

The match that is complete first wins; of those that end together, the longest. So the result is the same however
the text was cut into pieces, and a match never waits for a longer one.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopChecker:
    """Holds back only what may still become a stop string."""

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self._stop = tuple(stop)
        self._longest = max(map(len, self._stop), default=0)
        self._held = ""
        #: The stop string that ended the text; after it nothing more is given out.
        self.matched: str | None = None

    def add(self, text: str) -> str:
        """The part of the text so far that is certainly not of a stop string and was not given out before."""
        if not self._stop:
            return text
        if self.matched is not None or not text:
            return ""
        held = self._held + text
        if (match := self._first_match(held)) is not None:
            self._held = ""
            start, self.matched = match
            return held[:start]
        keep = self._undecided(held)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def finish(self) -> str:
        """The text ended for another reason: what was held back is text after all."""
        held, self._held = self._held, ""
        return held

    def _first_match(self, text: str) -> tuple[int, str] | None:
        """(start, stop string) of the match that ends first."""
        ends = [(at + len(stop), -len(stop), stop) for stop in self._stop if (at := text.find(stop)) >= 0]
        if not ends:
            return None
        end, _, stop = min(ends)
        return end - len(stop), stop

    def _undecided(self, text: str) -> int:
        """Length of the longest end of text that begins a stop string."""
        for size in range(min(self._longest - 1, len(text)), 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self._stop):
                return size
        return 0
