"""Runs a model on hand-made batches: every chunk, block table and row order is the test's choice, no scheduler's."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from parity.device import DEVICE
from torch import Tensor

from inferfleet.engine.batch import Batch, BatchBuilder
from inferfleet.engine.cache import PagedCache
from inferfleet.engine.contiguous import ContiguousCache
from inferfleet.engine.families import Model
from inferfleet.engine.request import Request
from inferfleet.engine.sampling_params import SamplingParams
from inferfleet.engine.scheduler import Plan

SLOTS = 20
LONGEST = 256


@dataclass
class Direct:
    """A model with a cache whose blocks are handed out in random order, so that no table is ever contiguous."""

    model: Model
    block_size: int = 16
    paged: bool = True
    dtype: torch.dtype = torch.float32
    device: torch.device = DEVICE
    tables: list[np.ndarray] = field(init=False)

    def __post_init__(self) -> None:
        spec = self.model.cache_spec
        size = self.block_size if self.paged else LONGEST
        per_row = -(-LONGEST // size)
        shuffled = random.Random(0)
        self.tables = []
        for _ in spec.sights:
            blocks = list(range(1, SLOTS * per_row + 1))
            shuffled.shuffle(blocks)
            self.tables.append(np.array(blocks, dtype=np.int32).reshape(SLOTS, per_row))
        kind = PagedCache if self.paged else ContiguousCache
        counts = [SLOTS * per_row + 1] * len(spec.sights)
        self.cache = kind(spec, counts, size, num_states=SLOTS, dtype=self.dtype, device=self.device)
        self.builder = BatchBuilder(self.cache, self.tables, max_num_batched_tokens=SLOTS * LONGEST, device=self.device)

    def request(self, slot: int, ids: Sequence[int]) -> Request:
        request = Request(str(slot), list(ids), SamplingParams())
        request.slot = slot
        if self.model.border is not None:
            request.variant = self.model.border.variant(len(ids))
        return request

    def step(self, rows: Sequence[tuple[Request, int]], samples: list[bool] | None = None) -> list[Tensor]:
        """Computes the next `count` tokens of each row; gives the logits of each row's tokens, [count, V].

        With `samples`, only the last token's of each row that it marks, [1, V].
        """
        counts = [count for _, count in rows]
        plan = Plan([row for row, _ in rows], counts, samples or [True] * len(rows))
        batch: Batch = self.builder.build(plan, scoring=samples is None)
        with torch.inference_mode():
            hidden = self.model.forward(batch.input_ids, batch.positions, batch)
            logits = self.model.compute_logits(hidden[batch.logits_index]).cpu()
        for row, count in rows:
            row.num_computed_tokens += count
        return list(logits.split(counts if samples is None else 1)) if len(logits) else []

    def score(self, prompts: Sequence[Sequence[int]], chunk: int) -> list[Tensor]:
        """Logits [T, V] of every prompt, all in one ragged batch, at most `chunk` tokens of each per step."""
        rows = [self.request(slot, ids) for slot, ids in enumerate(prompts)]
        parts: list[list[Tensor]] = [[] for _ in rows]
        while live := [row for row in rows if row.num_computed_tokens < row.num_tokens]:
            step = [(row, min(chunk, row.num_tokens - row.num_computed_tokens)) for row in live]
            for (row, _), logits in zip(step, self.step(step), strict=True):
                parts[rows.index(row)].append(logits)
        return [torch.cat(part) for part in parts]
