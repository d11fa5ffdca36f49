"""Steps that only decode, recorded as CUDA graphs and replayed: the device no longer waits for Python to name kernels.

A graph fixes every address and every size. Addresses are fixed because a step's tensors lie in the builder's arena,
cut the same way whenever the sizes are the same. Sizes are rounded up: rows that nobody owns have one token at position
0 of the null block, write nothing, and nobody reads what becomes of them. So a handful of graphs serves all steps.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from inferfleet.engine.batch import Batch, BatchBuilder
from inferfleet.engine.scheduler import Plan

if TYPE_CHECKING:
    from inferfleet.engine.families import Computes

#: Graphs that are kept; the one that waited longest for its next step makes room.
MAX_GRAPHS = 96
#: Blocks of a row's table: at least so many, else a power of two.
MIN_BLOCKS = 32


@dataclass(frozen=True, slots=True)
class Recorded:
    """A graph and where it leaves the hidden states [rows, H]."""

    graph: torch.cuda.CUDAGraph
    hidden: Tensor


class Replay:
    """Decoding steps of one model on one CUDA device."""

    def __init__(self, model: Computes) -> None:
        self._model = model
        self._recorded: OrderedDict[tuple[int, int], Recorded] = OrderedDict()
        # One after another they use the same memory: no graph leaves anything in it for the next.
        self._pool = torch.cuda.graph_pool_handle()

    def build(self, plan: Plan, builder: BatchBuilder) -> Batch | None:
        """The step's batch in rounded sizes; None for a step that does more than decode, or more than fits."""
        if not all(plan.samples) or any(count != 1 for count in plan.num_tokens):
            return None
        longest = max(row.num_computed_tokens for row in plan.rows) + 1
        rows = min(rounded_rows(len(plan.rows)), builder.max_rows)
        width = min(rounded_blocks(-(-longest // builder.cache.block_size)), builder.table_width)
        return builder.build_decodes(plan, rows, width) if len(plan.rows) <= rows else None

    def hidden(self, batch: Batch) -> Tensor:
        """Hidden states [rows, H] of a batch that `build` made, until the next call; recorded if its sizes are new."""
        shape = (batch.num_tokens, batch.block_tables[0].shape[1])
        if shape not in self._recorded:
            self._recorded[shape] = self._record(batch)
            if len(self._recorded) > MAX_GRAPHS:
                self._recorded.popitem(last=False)
        self._recorded.move_to_end(shape)
        recorded = self._recorded[shape]
        recorded.graph.replay()
        return recorded.hidden

    def _record(self, batch: Batch) -> Recorded:
        # Once without recording: what is compiled or laid out on first use must not become part of the graph. It
        # stores the same keys and values as the replay will.
        self._model.forward(batch.input_ids, batch.positions, batch)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            hidden = self._model.forward(batch.input_ids, batch.positions, batch)
        return Recorded(graph, hidden)


def rounded_rows(count: int) -> int:
    """1, 2, 4, then multiples of 8, and of 32 from 64 on."""
    if count <= 4:
        return 1 << (count - 1).bit_length()
    step = 8 if count <= 64 else 32
    return -(-count // step) * step


def rounded_blocks(count: int) -> int:
    return max(MIN_BLOCKS, 1 << (count - 1).bit_length())
