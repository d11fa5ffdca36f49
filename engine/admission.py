"""What the engine takes: every field of a request against its limit, then the Requests of its answers. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from inferfleet.engine.errors import ContextLengthExceeded, InvalidRequest
from inferfleet.engine.matformer import SliceTable
from inferfleet.engine.request import Request
from inferfleet.engine.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class Published:
    """What a requeued request has already told of one answer: its tokens and the text made of them."""

    token_ids: tuple[int, ...] = ()
    text: str = ""


NOTHING_PUBLISHED = Published()


@dataclass(frozen=True, slots=True)
class Admission:
    """The limits of one engine."""

    vocab_size: int
    #: Tokens of prompt and answer together.
    max_model_len: int
    #: End of sequence, unless a request ignores it.
    eos_token_ids: frozenset[int]
    #: What requests may ask for beside the whole model, if anything.
    slices: SliceTable | None = None

    def requests(
        self,
        request_id: str,
        prompt: Sequence[int],
        sampling: SamplingParams,
        *,
        cache_salt: str,
        priority: int,
        arrival: int,
        matformer_slice: str | None,
        published: Mapping[int, Published],
    ) -> list[Request]:
        """One Request for each of the sampling.n answers. InvalidRequest names the field and the limit."""
        room = self.max_model_len - len(prompt)
        self._check(prompt, sampling, room)
        variant = self.variant(matformer_slice)
        if not set(published) <= set(range(sampling.n)):
            raise InvalidRequest(f"resume must name answers from 0 to {sampling.n - 1}", param="resume")
        ends = frozenset(sampling.stop_token_ids) | (frozenset() if sampling.ignore_eos else self.eos_token_ids)
        requests = []
        for index in range(sampling.n):
            output = published.get(index, NOTHING_PUBLISHED).token_ids
            self.check_tokens(output, "resume")
            request = Request(request_id, list(prompt), sampling, cache_salt, priority, arrival, index, variant=variant)
            request.max_tokens = room if sampling.max_tokens is None else sampling.max_tokens
            request.end_token_ids = ends
            request.resume(output)
            requests.append(request)
        return requests

    def variant(self, matformer_slice: str | None) -> str:
        """What computes a request for this slice, None being the engine's default. InvalidRequest names the known."""
        if matformer_slice is None:
            return (self.slices and self.slices.default) or ""
        if self.slices is None:
            raise InvalidRequest("this model has no MatFormer slices", param="matformer_slice")
        if matformer_slice not in self.slices.names:
            known = ", ".join(map(repr, self.slices.names))
            raise InvalidRequest(f"matformer_slice {matformer_slice!r} is not one of {known}", param="matformer_slice")
        return matformer_slice

    def check_prompt(self, prompt: Sequence[int], longest: int) -> None:
        """Refuses an empty prompt, ids outside the vocabulary and more than `longest` tokens."""
        if not prompt:
            raise InvalidRequest("the prompt must have at least one token", param="messages")
        if len(prompt) > longest:
            raise ContextLengthExceeded(
                f"the prompt has {len(prompt)} tokens; at most {longest} fit this model's context of"
                f" {self.max_model_len} tokens here",
                param="messages",
            )
        self.check_tokens(prompt, "messages")

    def check_tokens(self, token_ids: Sequence[int], param: str) -> None:
        if token_ids and not 0 <= min(token_ids) <= max(token_ids) < self.vocab_size:
            raise InvalidRequest(f"token ids must be from 0 to {self.vocab_size - 1}", param=param)

    def _check(self, prompt: Sequence[int], sampling: SamplingParams, room: int) -> None:
        self.check_prompt(prompt, self.max_model_len - 1)
        if sampling.max_tokens is not None and sampling.max_tokens > room:
            raise ContextLengthExceeded(
                f"max_tokens is {sampling.max_tokens}, but beside a prompt of {len(prompt)} tokens at most {room} fit"
                f" this model's context of {self.max_model_len} tokens here",
                param="max_tokens",
            )
        if sampling.min_tokens > room:
            raise ContextLengthExceeded(
                f"min_tokens is {sampling.min_tokens}, but beside a prompt of {len(prompt)} tokens at most {room} fit"
                f" this model's context of {self.max_model_len} tokens here",
                param="min_tokens",
            )
        self.check_tokens(tuple(sampling.logit_bias), "logit_bias")
        self.check_tokens(sampling.stop_token_ids, "stop_token_ids")
