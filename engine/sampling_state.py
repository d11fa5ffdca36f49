"""What the sampler remembers of one answer between steps: its random stream, its token counts, its fixed edits."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from inferfleet.engine.sampling_params import SamplingParams

Ids = NDArray[np.int64]
Values = NDArray[np.float32]


class TokenCounts:
    """The distinct tokens of prompt and output, and how often each is in the output. Grows by one entry a step."""

    def __init__(self, prompt: Sequence[int], output: Sequence[int]) -> None:
        ids, counts = np.unique(np.asarray(output, dtype=np.int64), return_counts=True)
        unseen = np.setdiff1d(np.asarray(prompt, dtype=np.int64), ids)
        self._ids = np.concatenate([ids, unseen])
        self._counts = np.concatenate([counts, np.zeros(len(unseen))]).astype(np.float32)
        self._size = len(self._ids)
        self._largest = int(self._ids.max(initial=-1))
        self._slot = {token: slot for slot, token in enumerate(self._ids.tolist())}

    def below(self, size: int) -> tuple[Ids, Values]:
        """(ids, counts) of the tokens that a model with `size` logits can pick; a prompt may hold others (media)."""
        ids, counts = self._ids[: self._size], self._counts[: self._size]
        if self._largest < size:
            return ids, counts
        return ids[ids < size], counts[ids < size]

    def add(self, token: int) -> None:
        """One more token of the output."""
        slot = self._slot.setdefault(token, self._size)
        if slot == self._size:
            self._append(token)
        self._counts[slot] += 1

    def _append(self, token: int) -> None:
        if self._size == len(self._ids):
            room = max(64, self._size)
            self._ids = np.concatenate([self._ids, np.zeros(room, dtype=np.int64)])
            self._counts = np.concatenate([self._counts, np.zeros(room, dtype=np.float32)])
        self._ids[self._size] = token
        self._largest = max(self._largest, token)
        self._size += 1


class Asked(Protocol):
    """What is read of a request (engine/request.py)."""

    id: str
    index: int
    sampling: SamplingParams
    prompt_token_ids: list[int]
    output_token_ids: list[int]
    end_token_ids: frozenset[int]


class RowState:
    """One answer's sampling state; lives as long as its Request.

    Follows the request's output: nothing has to be told, and asking twice for the same place gives the same pick.
    """

    def __init__(self, request: Asked) -> None:
        params = request.sampling
        self.params = params
        self.index = request.index
        self.seed = params.seed if params.seed is not None else _seed_of(request.id)
        self._output = request.output_token_ids
        self._counts: TokenCounts | None = None
        self._num_counted = len(self._output)
        if params.penalises:
            # Presence and frequency look at the output only; the prompt need not be read for them.
            prompt = request.prompt_token_ids if params.repetition_penalty != 1.0 else ()
            self._counts = TokenCounts(prompt, self._output)
        self.bias_ids: Ids = np.fromiter(params.logit_bias.keys(), np.int64)
        self.bias: Values = np.fromiter(params.logit_bias.values(), np.float32)
        self.end_ids: Ids = np.array(sorted(request.end_token_ids), dtype=np.int64)
        self._never_plain = bool(
            not params.greedy or params.penalises or params.logit_bias or params.logprobs is not None
        )

    @property
    def num_output(self) -> int:
        """Tokens picked so far: the place in the random stream."""
        return len(self._output)

    @property
    def counts(self) -> TokenCounts | None:
        """Up to date; None where no penalty needs them."""
        if self._counts is not None:
            for token in self._output[self._num_counted :]:
                self._counts.add(token)
            self._num_counted = len(self._output)
        return self._counts

    @property
    def holds_end_back(self) -> bool:
        """The answer may not end yet."""
        return self.num_output < self.params.min_tokens and len(self.end_ids) > 0

    @property
    def is_plain(self) -> bool:
        """Only the likeliest token is wanted."""
        return not (self._never_plain or self.holds_end_back)


def _seed_of(request_id: str) -> int:
    """Equal in every process and on every worker, unlike hash()."""
    return int.from_bytes(hashlib.blake2b(request_id.encode(), digest_size=8).digest(), "little")
