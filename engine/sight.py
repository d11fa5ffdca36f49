"""Which keys of its context a token sees. Knows no tensors: layers with the same sight share block tables."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Sight:
    """All keys up to the token itself; or of those the last `window`; or those of its own chunk of `chunk` tokens.

    window 3, token 7:  . . . . . 5 6 7        chunk 4, token 7:  . . . . 4 5 6 7     token 8:  8
    """

    window: int | None = None
    chunk: int | None = None

    def __post_init__(self) -> None:
        if self.window is not None and self.chunk is not None:
            raise ValueError("a token sees a window or a chunk, not both")
        if self.span is not None and self.span < 1:
            raise ValueError(f"a window or chunk has at least one token: {self}")

    @property
    def span(self) -> int | None:
        """The most keys that a token sees; None = no bound."""
        return self.window if self.chunk is None else self.chunk

    def first_key(self, position: int) -> int:
        """The first key that the token at `position` sees; no later token sees an earlier one."""
        if self.chunk is not None:
            return position - position % self.chunk
        return 0 if self.window is None else max(0, position - self.window + 1)

    def first_block(self, position: int, block_size: int) -> int:
        """The block of that key."""
        return self.first_key(position) // block_size


EVERYTHING = Sight()
