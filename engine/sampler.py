"""Picks each row's next token on the device. A row's pick depends on its own logits, parameters and place alone.

Order of a pick: penalties, bias, min_tokens (logit_edits.py); temperature; min_p; top_k; top_p, each on what the one
before left; then one uniform number (philox.py) through the inverse of the cumulative distribution. All sums are
float64 over float32 weights, so that their order cannot move a pick. Logprobs are those of the model: log-softmax of
the logits before any of it.

Shapes: N rows, V vocabulary, M rows of a group, K candidates.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from inferfleet.engine.logit_edits import edited
from inferfleet.engine.nucleus import Limits, pick_filtered
from inferfleet.engine.philox import uniforms
from inferfleet.engine.sampling_state import RowState

__all__ = ["RowState", "SampledRows", "Sampler", "TokenLogprobs"]

#: Vocabulary entries looked at together: the likeliest token, and the drawn one, are found by block, then inside it.
BLOCK = 256
#: Entries of one group on the CPU: what fits its caches (1 MB). A CUDA device takes all rows at once.
CPU_GROUP = 2**18


class TokenLogprobs(NamedTuple):
    """Of one picked token: its log-probability, and (id, log-probability) of the likeliest, best first."""

    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class SampledRows:
    """What a step picked, row by row. Rows in `failed` had logits that were not finite; their token is 0, a filler."""

    token_ids: list[int]
    #: None where no row asked; else by row, None for rows that did not ask or failed.
    logprobs: list[TokenLogprobs | None] | None
    failed: list[int]


class Sampler:
    """Stateless; what lasts between steps is in the rows."""

    @torch.inference_mode()
    def sample(self, logits: Tensor, rows: Sequence[RowState]) -> SampledRows:
        """One token for each row, recorded in it. logits [N, V] on any device; unchanged afterwards.

        A row fails where its largest logit is not finite: any NaN, any +inf, or nothing but -inf.
        """
        logits = logits.float()
        top, likeliest = _argmax(logits)
        if all(row.is_plain for row in rows):
            token_ids = torch.where(top.isfinite(), likeliest, -1).tolist()
        else:
            token_ids = _pick(logits, rows, top.isfinite())
        failed = [number for number, token in enumerate(token_ids) if token < 0]
        logprobs = _logprobs(logits, rows, token_ids)
        return SampledRows([max(token, 0) for token in token_ids], logprobs, failed)


def _argmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """(largest value [N], NaN if there is one; its first index [N]). Ten times faster on CPU than torch.max(-1)."""
    size = logits.shape[1]
    whole = size - size % BLOCK
    maxima = logits[:, :whole].unflatten(1, (-1, BLOCK)).amax(-1) if whole else logits[:, :0]
    if whole < size:
        maxima = torch.cat([maxima, logits[:, whole:].amax(-1, keepdim=True)], dim=1)
    block = maxima.argmax(-1, keepdim=True)
    inside = _indexes(block, size)
    values, offset = logits.gather(1, inside).max(-1, keepdim=True)
    return values[:, 0], inside.gather(1, offset)[:, 0]


def _indexes(block: Tensor, size: int) -> Tensor:
    """[N, BLOCK] vocabulary indexes of one block of each row; the last index repeats where the block is short."""
    return (block * BLOCK + torch.arange(BLOCK, device=block.device)).clamp_(max=size - 1)


def _pick(logits: Tensor, rows: Sequence[RowState], finite: Tensor) -> list[int]:
    """Token of each row, -1 for rows that are not finite."""
    with edited(logits, rows):
        top, likeliest = _argmax(logits)
        drawn = [number for number, row in enumerate(rows) if not row.params.greedy]
        if drawn:
            _draw(logits, rows, drawn, top, likeliest)
        return torch.where(finite & top.isfinite(), likeliest, -1).tolist()


def _draw(logits: Tensor, rows: Sequence[RowState], drawn: list[int], top: Tensor, out: Tensor) -> None:
    """Write a drawn token to out [N] for the rows in `drawn`."""
    numbers = _uniforms([rows[number] for number in drawn])
    limits = [Limits.of(rows[number].params) for number in drawn]
    for group in _groups(limits, logits):
        at = torch.tensor([drawn[member] for member in group], device=logits.device)
        heat = torch.tensor([rows[drawn[member]].params.temperature for member in group], dtype=torch.float32)
        uniform = torch.from_numpy(numbers[group]).to(logits.device)
        # Spoiled rows become zeros: what is drawn from them is thrown away, but must not stop the others.
        scaled = logits[at].sub_(top[at, None]).div_(heat.to(logits.device)[:, None]).nan_to_num_(nan=0.0)
        weights = scaled.softmax(-1)
        some = [limits[member] for member in group]
        out[at] = pick_filtered(weights, some, uniform) if some[0].any else _pick_any(weights, uniform)


def _groups(limits: Sequence[Limits], logits: Tensor) -> Iterator[list[int]]:
    """Rows that are computed together: all with limits or all without, and on the CPU only as many as its caches
    hold."""
    for wanted in (False, True):
        members = [member for member, limit in enumerate(limits) if limit.any is wanted]
        yield from _cut(members, logits)


def _cut(members: Sequence[int], logits: Tensor) -> Iterator[list[int]]:
    size = max(1, CPU_GROUP // logits.shape[1]) if logits.device.type == "cpu" else max(1, len(members))
    for start in range(0, len(members), size):
        yield list(members[start : start + size])


def _uniforms(rows: Sequence[RowState]) -> np.ndarray:
    """float64 [len(rows)] in [0, 1)."""
    places = np.array([(row.seed, row.index, row.num_output) for row in rows], dtype=np.uint64)
    return uniforms(*places.T)


def _pick_any(weights: Tensor, uniform: Tensor) -> Tensor:
    """Draw from all of the vocabulary, in its order. weights [M, V] float32, uniform [M] float64 -> ids [M]."""
    size = weights.shape[1]
    whole = size - size % BLOCK
    sums = weights[:, :whole].unflatten(1, (-1, BLOCK)).sum(-1, dtype=torch.float64)
    if whole < size:
        rest = weights[:, whole:].sum(-1, keepdim=True, dtype=torch.float64)
        sums = torch.cat([sums, rest], dim=1)
    upto = sums.cumsum(-1)
    target = below(uniform[:, None] * upto[:, -1:], upto[:, -1:])
    block = (upto <= target).sum(-1, keepdim=True)
    inside = _indexes(block, size)
    own = weights.gather(1, inside).double()
    own[:, 1:].masked_fill_(inside[:, 1:] == inside[:, :-1], 0.0)  # the repeated last index counts once
    left = target - (upto - sums).gather(1, block)
    offset = (own.cumsum(-1) <= left).sum(-1, keepdim=True)
    # The block's own sum may differ from the blocks' in the last bit: never beyond its last possible token.
    last = ((own > 0) * torch.arange(BLOCK, device=own.device)).amax(-1, keepdim=True)
    return inside.gather(1, torch.minimum(offset, last))[:, 0]


def below(value: Tensor, limit: Tensor) -> Tensor:
    """value, but less than limit: u * total may round up to total, which would be behind the last token."""
    return torch.minimum(value, limit.nextafter(torch.zeros_like(limit)))


def _logprobs(logits: Tensor, rows: Sequence[RowState], token_ids: list[int]) -> list[TokenLogprobs | None] | None:
    asked = {n: k for n, row in enumerate(rows) if (k := row.params.logprobs) is not None and token_ids[n] >= 0}
    if not any(row.params.logprobs is not None for row in rows):
        return None
    found: list[TokenLogprobs | None] = [None] * len(rows)
    for group in _cut(list(asked), logits):
        at = torch.tensor(group, device=logits.device)
        logprobs = logits[at].log_softmax(-1)
        picked = torch.tensor([token_ids[n] for n in group], device=logits.device)
        own = logprobs.gather(1, picked[:, None])[:, 0].tolist()
        values, ids = logprobs.topk(min(max(asked[n] for n in group), logits.shape[1]), -1)
        tops = [tuple(zip(i, v, strict=True)) for i, v in zip(ids.tolist(), values.tolist(), strict=True)]
        for n, logprob, top in zip(group, own, tops, strict=True):
            found[n] = TokenLogprobs(logprob, top[: asked[n]])
    return found
