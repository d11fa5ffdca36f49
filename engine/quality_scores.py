"""What a model says after each token of some prompts, kept small, and how far another model is from it.

A distribution is kept as its likeliest tokens and the mass of all others as one more outcome: the divergence over
these is the whole one where the vocabulary is no larger, and a close lower bound where it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from inferfleet.engine.errors import InvalidRequest, NumericalError
from inferfleet.engine.layers.experts import Experts
from inferfleet.engine.offline import LLM

#: Tokens kept of each distribution, and the positions of which they are kept: 32 KiB each, 1 GiB together.
LIKELIEST = 4096
MAX_POSITIONS = 1 << 15
#: Rows of logits that are turned into probabilities at a time.
ROWS = 32


@dataclass(frozen=True)
class Kept:
    """The distributions after the tokens of one prompt."""

    #: [T]: the likeliest token.
    best: Tensor
    #: [T, n] int32 and their log-probabilities [T, n] float32.
    ids: Tensor
    logprobs: Tensor
    #: [T] float64: log of the mass of all other tokens.
    rest: Tensor
    #: Layer -> [T, K]: the experts that its router chose.
    experts: dict[str, Tensor]


@dataclass(frozen=True)
class Distance:
    """How far a model is from the full one after each token of one prompt."""

    #: [T] float64, nats.
    divergence: Tensor
    #: [T]: whether both have the same likeliest token.
    agrees: Tensor
    #: Layer -> (choices, those that the full model did not make for that token).
    flips: dict[str, tuple[int, int]]


def keep(llm: LLM, prompts: Sequence[Sequence[int]]) -> list[Kept]:
    """The full model's side. InvalidRequest for more positions than are kept, NumericalError for NaN."""
    if (count := sum(map(len, prompts))) > MAX_POSITIONS:
        raise InvalidRequest(f"the prompts have {count} tokens; {MAX_POSITIONS} are compared at most", param="prompts")
    found = []
    for ids in prompts:
        with recorded_experts(llm) as experts:
            logits = _logits(llm, ids)
        rows = zip(*map(_kept, logits.split(ROWS)), strict=True)
        best, likeliest, logprobs, rest = (torch.cat(parts) for parts in rows)
        found.append(Kept(best, likeliest, logprobs, rest, _joined(experts, len(ids))))
    return found


def compare(llm: LLM, prompts: Sequence[Sequence[int]], full: Sequence[Kept]) -> list[Distance]:
    """The quantised model's side."""
    found = []
    for ids, kept in zip(prompts, full, strict=True):
        with recorded_experts(llm) as experts:
            logits = _logits(llm, ids)
        parts = zip(*(t.split(ROWS) for t in (logits, kept.ids, kept.logprobs, kept.rest)), strict=True)
        chosen = _joined(experts, len(ids))
        found.append(
            Distance(
                torch.cat([_divergence(*part) for part in parts]),
                logits.argmax(dim=1) == kept.best,
                {layer: _flips(kept.experts[layer], now) for layer, now in chosen.items()},
            )
        )
    return found


def _logits(llm: LLM, ids: Sequence[int]) -> Tensor:
    logits = llm.score(ids)
    if bool(logits.isnan().any() | logits.isposinf().any()):
        raise NumericalError("the model's logits are not finite, so nothing can be compared")
    return logits


def _kept(logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits [R, V] -> the tensors of a Kept."""
    logprobs = logits.double().log_softmax(dim=1)
    top = logprobs.topk(min(LIKELIEST, logprobs.shape[1]), dim=1)
    return logits.argmax(dim=1), top.indices.int(), top.values.float(), _rest(logprobs, top.indices)


def _rest(logprobs: Tensor, ids: Tensor) -> Tensor:
    return logprobs.scatter(1, ids, -torch.inf).logsumexp(dim=1)


def _divergence(logits: Tensor, ids: Tensor, logprobs: Tensor, rest: Tensor) -> Tensor:
    """KL(full || these logits) [R], the rest of the vocabulary as one outcome."""
    ours = logits.double().log_softmax(dim=1)
    ids = ids.long()
    full = torch.cat((logprobs.double(), rest.unsqueeze(1)), dim=1)
    other = torch.cat((ours.gather(1, ids), _rest(ours, ids).unsqueeze(1)), dim=1)
    # What the full model never says counts nothing, whatever the other makes of it.
    terms = torch.where(full == -torch.inf, 0.0, full.exp() * (full - other))
    return terms.sum(dim=1).clamp_(min=0)


@contextmanager
def recorded_experts(llm: LLM) -> Iterator[dict[str, list[Tensor]]]:
    """Layer -> what its router chose in each step meanwhile."""
    model = cast("nn.Module", llm.engine.model)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Experts)}
    found: dict[str, list[Tensor]] = {name: [] for name in layers}
    for name, layer in layers.items():
        layer.recorder = lambda ids, steps=found[name]: steps.append(ids.to("cpu", torch.int32))
    try:
        yield found
    finally:
        for layer in layers.values():
            layer.recorder = None


def _joined(experts: dict[str, list[Tensor]], tokens: int) -> dict[str, Tensor]:
    """[T, K] of each layer, also where its experts see each of a token's choices as a row."""
    return {layer: torch.cat([ids.flatten() for ids in steps]).view(tokens, -1) for layer, steps in experts.items()}


def _flips(full: Tensor, ours: Tensor) -> tuple[int, int]:
    is_new = (ours.unsqueeze(2) != full.unsqueeze(1)).all(dim=2)
    return ours.numel(), int(is_new.sum())
