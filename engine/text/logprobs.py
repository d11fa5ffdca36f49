"""Logprobs in OpenAI's shape."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from inferfleet.engine.text.tokenizer import Tokenizer

#: What OpenAI writes for "as good as never"; JSON has no infinities.
LOWEST = -9999.0


def logprob_entry(
    tokenizer: Tokenizer, token_id: int, logprob: float, top: Iterable[tuple[int, float]]
) -> dict[str, Any]:
    """{"token", "logprob", "bytes", "top_logprobs": [...]} of one picked token.

    token is readable text (half a code point shows as U+FFFD); bytes are exact, and join to the answer's UTF-8.
    """
    likeliest = [_entry(tokenizer, other, value) for other, value in top]
    return _entry(tokenizer, token_id, logprob) | {"top_logprobs": likeliest}


def _entry(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    data = tokenizer.token_bytes(token_id)
    return {"token": data.decode(errors="replace"), "logprob": max(logprob, LOWEST), "bytes": list(data)}
