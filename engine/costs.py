"""What a context costs in cache memory, before it is laid out in blocks. Numbers only: no torch, no model.

bytes(n tokens) = state + per_token * n + sum over spans of per_token_in_span * min(n, span)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


@dataclass(frozen=True, slots=True)
class CacheCosts:
    """The bytes that one sequence takes: layers that keep every token, layers that keep a span, fixed state."""

    #: Bytes of each token in the layers that keep all of them.
    per_token: int
    #: (span, bytes of each token): layers that keep no more than a window or a chunk of their last tokens.
    spans: tuple[tuple[int, int], ...] = ()
    #: Bytes of recurrent state, whatever the length.
    state: int = 0

    def context(self, tokens: int) -> int:
        """Bytes that a context of so many tokens takes."""
        return self.state + self.per_token * tokens + sum(size * min(tokens, span) for span, size in self.spans)

    def __str__(self) -> str:
        parts = [f"{in_units(self.per_token)} a token"] if self.per_token else []
        parts += [f"{in_units(size)} for each of the last {span} tokens" for span, size in self.spans]
        parts += [f"{in_units(self.state)} of state"] if self.state else []
        return " + ".join(parts)


def most(limit: int, fits: Callable[[int], bool]) -> int:
    """The largest number of up to `limit` that still fits, where all smaller ones do; 0 if not even 1 does."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def in_units(size: float) -> str:
    """A number of bytes for a person: `48 KiB`, `12.3 GiB`."""
    unit = 0
    while abs(size) >= 1024 and unit < len(UNITS) - 1:
        size, unit = size / 1024, unit + 1
    text = f"{size:.1f}".removesuffix(".0") if unit else f"{size:.0f}"
    return f"{text} {UNITS[unit]}"
