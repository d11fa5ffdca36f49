"""Changes to single logits before a pick: penalties, bias, min_tokens. Made in place and taken back afterwards.

Only the entries that change are touched: a batch of 32 rows over 262144 tokens is 33 MB, and copying it would cost
more than the pick.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from inferfleet.engine.sampling_state import RowState

#: Penalties can push a logit beyond float32; there it stays comparable instead of infinite.
_LARGEST = torch.finfo(torch.float32).max

Place = tuple[Tensor, Tensor]


@contextmanager
def edited(logits: Tensor, rows: Sequence[RowState]) -> Iterator[None]:
    """logits [N, V] float32 as `rows` want them inside the block, as they were outside it.

    Order: repetition penalty, frequency and presence penalty, bias, min_tokens.
    """
    undo: list[tuple[Place, Tensor]] = []
    try:
        for edit in (_penalise, _bias, _hold_end_back):
            change = edit(logits, rows)
            if change is not None:
                place, values = change
                undo.append((place, logits[place]))
                logits[place] = values
        yield
    finally:
        for place, values in reversed(undo):
            logits[place] = values


def _penalise(logits: Tensor, rows: Sequence[RowState]) -> tuple[Place, Tensor] | None:
    """Repetition as Hugging Face's (prompt and output), the others as OpenAI's (output only)."""
    size = logits.shape[1]
    some = [(number, row.params, *seen.below(size)) for number, row in enumerate(rows) if (seen := row.counts)]
    if not some:
        return None
    place = _place(logits, [number for number, *_ in some], [ids for *_, ids, _ in some])
    penalties = [(p.repetition_penalty, p.frequency_penalty, p.presence_penalty) for _, p, *_ in some]
    sizes = [len(ids) for *_, ids, _ in some]
    columns = np.repeat(np.array(penalties, dtype=np.float32), sizes, axis=0)
    repetition, frequency, presence = _to(logits, columns).unbind(1)
    times = _to(logits, np.concatenate([counts for *_, counts in some]))
    values = logits[place]
    values = torch.where(values < 0, values * repetition, values / repetition)
    values = values - frequency * times - presence * (times > 0)
    return place, values.clamp(-_LARGEST, _LARGEST)


def _bias(logits: Tensor, rows: Sequence[RowState]) -> tuple[Place, Tensor] | None:
    some = [(number, row) for number, row in enumerate(rows) if len(row.bias_ids)]
    if not some:
        return None
    place = _place(logits, [number for number, _ in some], [row.bias_ids for _, row in some])
    return place, logits[place] + _to(logits, np.concatenate([row.bias for _, row in some]))


def _hold_end_back(logits: Tensor, rows: Sequence[RowState]) -> tuple[Place, Tensor] | None:
    some = [(number, row.end_ids) for number, row in enumerate(rows) if row.holds_end_back]
    if not some:
        return None
    # A tokenizer may know end tokens that the model has no logit for.
    known = [(number, ids[ids < logits.shape[1]]) for number, ids in some]
    place = _place(logits, [number for number, _ in known], [ids for _, ids in known])
    return place, torch.full_like(logits[place], -torch.inf)


def _place(logits: Tensor, numbers: Sequence[int], ids: Sequence[NDArray[np.int64]]) -> Place:
    """Where ids[i] of row numbers[i] are, for all i."""
    rows = np.repeat(np.array(numbers, dtype=np.int64), [len(some) for some in ids])
    return _to(logits, rows), _to(logits, np.concatenate(ids))


def _to(logits: Tensor, array: NDArray[np.generic]) -> Tensor:
    return torch.from_numpy(array).to(logits.device, non_blocking=True)
