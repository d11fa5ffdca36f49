"""Log-probabilities in the form that OpenAI's clients read. No torch."""

from __future__ import annotations

from typing import Any, Protocol

#: What OpenAI writes for "as good as impossible"; JSON has no infinity.
LEAST = -9999.0


class Spelling(Protocol):
    """What is needed of a tokenizer."""

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token adds to a text."""


class Likelihood(Protocol):
    """What is needed of the sampler's record of one token."""

    @property
    def logprob(self) -> float: ...

    @property
    def top(self) -> tuple[tuple[int, float], ...]: ...


def openai_entry(spelling: Spelling, token_id: int, likelihood: Likelihood) -> dict[str, Any]:
    """One token's entry: itself and the likeliest in its place."""
    tops = [_token(spelling, other, logprob) for other, logprob in likelihood.top]
    return _token(spelling, token_id, likelihood.logprob) | {"top_logprobs": tops}


def _token(spelling: Spelling, token_id: int, logprob: float) -> dict[str, Any]:
    data = spelling.token_bytes(token_id)
    # A token may be half a code point: only `bytes` says which half.
    return {"token": data.decode(errors="replace"), "logprob": max(logprob, LEAST), "bytes": list(data)}
