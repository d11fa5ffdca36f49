"""Draws from the likely end of a distribution (min_p, top_k, top_p) without sorting the vocabulary.

Every filter keeps a set "at least so likely", so it is enough to look at the tokens above some floor, if the floor is
low enough for the row. Above the first floor are at most 8192 tokens, usually far fewer, and it is checked: min_p's
own floor is higher, or top_k tokens are above it, or their mass reaches top_p. Rows that fail the check get the highest
floor that is proved to be low enough; in the worst case that is 0, a sort of everything.

Tokens exactly as likely as the last one kept are kept too: which of them a sort puts first is chance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from inferfleet.engine.sampling_params import SamplingParams

#: No more than 1/floor tokens can be at least so likely.
FLOOR = 2.0**-13
#: Bits of a float32 that are left out when likelihoods are counted in buckets: 8 buckets for each power of two.
BUCKET_BITS = 20


@dataclass(frozen=True, slots=True)
class Limits:
    """The filters of one row."""

    top_k: int
    top_p: float
    min_p: float

    @classmethod
    def of(cls, params: SamplingParams) -> Limits:
        return cls(params.top_k, params.top_p, params.min_p)

    @property
    def any(self) -> bool:
        return self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0


@dataclass(frozen=True, slots=True)
class _Columns:
    """Limits of M rows as tensors [M, 1]."""

    top_k: Tensor  # int64, V where there is none
    top_p: Tensor  # float64
    min_p: Tensor  # float32
    #: bool: neither min_p nor top_k narrows the distribution before top_p.
    whole: Tensor

    @classmethod
    def of(cls, limits: Sequence[Limits], size: int, device: torch.device) -> _Columns:
        def column(values: list[float], dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype).to(device)[:, None]

        return cls(
            column([min(limit.top_k, size) or size for limit in limits], torch.int64),
            column([limit.top_p for limit in limits], torch.float64),
            column([limit.min_p for limit in limits], torch.float32),
            column([limit.min_p == 0.0 and not 0 < limit.top_k < size for limit in limits], torch.bool),
        )

    def __getitem__(self, rows: Tensor) -> _Columns:
        return _Columns(self.top_k[rows], self.top_p[rows], self.min_p[rows], self.whole[rows])


def pick_filtered(probs: Tensor, limits: Sequence[Limits], uniform: Tensor) -> Tensor:
    """probs [M, V] float32 rows that sum to 1, uniform [M] float64 in [0, 1) -> token ids [M]."""
    columns = _Columns.of(limits, probs.shape[1], probs.device)
    best = probs.amax(-1, keepdim=True)
    values, ids, counts = _above(probs, best.clamp(max=FLOOR))
    picked = _draw(values, ids, columns, uniform)
    rows = (~_is_enough(values, counts, columns)).nonzero()[:, 0]
    if len(rows):
        floor = _sure_floor(probs[rows], [limits[row] for row in rows.tolist()], best[rows])
        values, ids, _ = _above(probs[rows], floor)
        picked[rows] = _draw(values, ids, columns[rows], uniform[rows])
    return picked


def _above(probs: Tensor, floor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens at least as likely as floor [M, 1]: (values [M, K], ids [M, K], how many [M, 1]).

    Likeliest first, equals by id; short rows end with zeros.
    """
    rows, columns = (probs >= floor).nonzero(as_tuple=True)
    counts = rows.bincount(minlength=len(probs))
    place = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows]
    values = probs.new_zeros(len(probs), int(counts.max()))
    ids = torch.zeros_like(values, dtype=torch.int64)
    values[rows, place] = probs[rows, columns]
    ids[rows, place] = columns
    values, order = torch.sort(values, dim=-1, descending=True, stable=True)
    return values, ids.gather(1, order), counts[:, None]


def _is_enough(values: Tensor, counts: Tensor, limits: _Columns) -> Tensor:
    """[M] True where no token below the floor can be kept."""
    by_min_p = limits.min_p * values[:, :1] >= FLOOR
    by_top_k = limits.top_k <= counts
    by_top_p = limits.whole & (values.sum(-1, keepdim=True, dtype=torch.float64) >= limits.top_p)
    return (by_min_p | by_top_k | by_top_p)[:, 0]


def _sure_floor(probs: Tensor, limits: Sequence[Limits], best: Tensor) -> Tensor:
    """[M, 1] floors below which nothing can be kept."""
    floors = []
    for row, limit in enumerate(limits):
        sure = [0.0]
        if limit.min_p > 0.0:
            # A hair lower: the comparison that decides is in float32.
            sure.append(limit.min_p * best[row].item() * (1 - 1e-6))
        if 0 < limit.top_k < probs.shape[1]:
            sure.append(probs[row].topk(limit.top_k).values[-1].item())
        if len(sure) == 1:
            sure.append(_floor_of_mass(probs[row], limit.top_p))
        floors.append(max(sure))
    return torch.tensor(floors, dtype=probs.dtype).to(probs.device)[:, None]


def _floor_of_mass(probs: Tensor, mass: float) -> float:
    """A floor above which probs [V] sum to `mass`, and not much more; 0 if rounding leaves less than that in all."""
    # Positive floats are ordered as their bits are.
    buckets = probs.view(torch.int32) >> BUCKET_BITS
    upto = buckets.bincount(weights=probs.double()).flip(0).cumsum(0)
    enough = (upto >= mass * (1 + 1e-9)).nonzero()[:, 0]
    if len(enough) == 0:
        return 0.0
    bucket = len(upto) - 1 - int(enough[0])
    return torch.tensor(bucket << BUCKET_BITS, dtype=torch.int32).view(torch.float32).item()


def _draw(values: Tensor, ids: Tensor, limits: _Columns, uniform: Tensor) -> Tensor:
    """Apply the limits to candidates [M, K], sorted, and draw one of those left -> ids [M]."""
    last = (limits.top_k - 1).clamp(max=values.shape[1] - 1)
    kept = (values >= limits.min_p * values[:, :1]) & (values >= values.gather(1, last))
    upto = values.double().cumsum(-1)
    whole = torch.ones_like(limits.top_p)
    mass = torch.where(limits.whole, whole, _at_last(upto, kept))
    in_nucleus = kept & (upto - values < limits.top_p * mass)
    in_nucleus[:, 0] = True
    kept &= (values >= _at_last(values, in_nucleus)) | (limits.top_p >= 1.0)
    total = _at_last(upto, kept)
    target = torch.minimum(uniform[:, None] * total, total.nextafter(torch.zeros_like(total)))
    return ids.gather(1, (upto <= target).sum(-1, keepdim=True))[:, 0]


def _at_last(values: Tensor, kept: Tensor) -> Tensor:
    """[M, 1] the value at the last kept candidate; `kept` is a beginning of each row."""
    return values.gather(1, kept.sum(-1, keepdim=True) - 1)
