"""One answer that the engine is writing: its tokens, how far they are computed, how it ends. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from inferfleet.engine.sampling_params import SamplingParams


class Status(Enum):
    """Where a request is. HELD: waits until the first of its group has filled the prefix cache."""

    HELD = "held"
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Request:
    """Mutable state of one answer; n > 1 answers to a prompt are n Requests with one id and indexes 0..n-1.

    `output_token_ids` given at the start were published before (a requeued job): they count as output for
    penalties, limits and the random stream, and their keys and values are computed like a prompt's.
    """

    id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    #: Requests share cached prefixes only within one salt (a tenant).
    cache_salt: str = ""
    #: Lower runs first.
    priority: int = 0
    #: Order of arrival; unique for a group.
    arrival: int = 0
    index: int = 0
    #: Output tokens at most, context length taken into account; set by whoever admits the request.
    max_tokens: int = 1
    #: Tokens that end the text (end of sequence and stop_token_ids).
    end_token_ids: frozenset[int] = frozenset()
    output_token_ids: list[int] = field(default_factory=list)
    #: False: computes every token itself and leaves nothing behind (scoring wants each position's logits).
    shares_prefix: bool = True
    #: Which of the model's variants computes it (a slice, a set of rotary factors); "" where there are none.
    variant: str = ""

    #: Prompt and output in one list: what the model has to have seen before the next token.
    token_ids: list[int] = field(init=False)
    status: Status = Status.WAITING
    #: Tokens whose keys and values are in the cache.
    num_computed_tokens: int = 0
    #: Of those, how many the prefix cache gave when the request first ran.
    num_cached_tokens: int | None = None
    #: Row of the block tables while running.
    slot: int = -1
    #: Hashes of the full blocks of token_ids, as far as anybody asked (see prefix.py).
    block_hashes: list[bytes] = field(default_factory=list)
    num_preemptions: int = 0
    finish_reason: str | None = None

    def __post_init__(self) -> None:
        self.token_ids = self.prompt_token_ids + self.output_token_ids

    @property
    def key(self) -> tuple[int, int, int]:
        """Who goes first: the smaller."""
        return self.priority, self.arrival, self.index

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def max_num_tokens(self) -> int:
        """The longest that prompt and output can become."""
        return self.num_prompt_tokens + self.max_tokens

    def resume(self, token_ids: Sequence[int]) -> None:
        """Before it runs: tokens of the answer that an earlier run has published."""
        self.token_ids += token_ids
        self.output_token_ids += token_ids

    def append(self, token_id: int) -> None:
        self.token_ids.append(token_id)
        self.output_token_ids.append(token_id)

    def end(self, reason: str) -> None:
        self.status = Status.FINISHED
        self.finish_reason = reason

    def end_by_tokens(self) -> str | None:
        """The finish reason that the tokens so far give: "stop", "length" or None."""
        count = len(self.output_token_ids)
        if count and count >= self.sampling.min_tokens and self.output_token_ids[-1] in self.end_token_ids:
            return "stop"
        return "length" if count >= self.max_tokens else None
