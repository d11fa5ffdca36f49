"""Where a model that computes long sequences in another way changes over: one line for the scheduler. No torch.

A variant's keys and values mean nothing to another variant, so a sequence that grows across the border is computed
again from its first token, and no cached prefix serves both sides.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Border:
    """Sequences of more than `length` known tokens are computed by the variant `beyond`, all others by `within`."""

    length: int
    within: str
    beyond: str

    def variant(self, num_tokens: int) -> str:
        """Which variant computes a sequence of so many tokens, those still to be computed included."""
        return self.within if num_tokens <= self.length else self.beyond
