"""One step's tensors, built with numpy from what the scheduler planned. Knows no model and no queue.

    T tokens of the step, R rows, N rows that sample, g cache group

All numbers of a step lie in one stretch of memory that is allocated once: on a CPU the tensors are views of it,
on a GPU it is pinned and travels in one copy.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from inferfleet.engine.request import Request

if TYPE_CHECKING:
    from inferfleet.engine.cache import Cache
    from inferfleet.engine.scheduler import Plan

_TORCH: dict[type[np.generic], torch.dtype] = {np.int64: torch.int64, np.int32: torch.int32}
#: Every tensor of the arena starts at a multiple of it (vector loads on any device).
ALIGNMENT = 64


@dataclass(slots=True)
class Batch:
    """One step. Its tensors are valid until the next one is built."""

    input_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64
    query_start: Tensor  # [R+1] int32: row r owns tokens query_start[r] : query_start[r+1]
    seq_lens: Tensor  # [R] int32: context, this step's tokens included
    logits_index: Tensor  # [N] int64: last token of each row that samples; when scoring, every token
    state_slots: Tensor  # [R] int64: where each row's recurrent state lies
    block_tables: tuple[Tensor, ...]  # per group [R, max_blocks] int32
    slot_mapping: tuple[Tensor, ...]  # per group [T] int64
    rows: list[Request]
    sample_rows: list[Request]
    #: (tokens of this step, context) of each row, on the host.
    row_lens: list[tuple[int, int]]
    max_query_len: int
    cache: Cache
    #: Where the tensors lie.
    arena: Arena
    #: State slots (from, to) that were copied since the last batch, before this one's rows begin.
    moves: list[tuple[int, int]]
    #: Made by `build_decodes`: rows beyond len(rows) are nobody's.
    is_filled_up: bool = False

    @property
    def num_tokens(self) -> int:
        return self.input_ids.shape[0]

    def attend(self, layer: int, q: Tensor, k: Tensor | None, v: Tensor | None, *, scale: float) -> Tensor:
        """Causal attention of every row over its own context -> [T, h, d].

        layer: index of the owning layer in CacheSpec; q [T, h, d]; k, v [T, kv, d], stored before they are read,
        or both None for a layer that reads what its owner stored earlier in this step.
        """
        return self.cache.attend(self, layer, q, k, v, scale)

    def attend_latent(self, layer: int, q: Tensor, latent: Tensor, *, scale: float) -> Tensor:
        """The same over latents: q [T, h, rank + rope_dim], latent [T, rank + rope_dim] -> [T, h, rank]."""
        return self.cache.attend_latent(self, layer, q, latent, scale)

    def states(self, layer: int) -> tuple[Tensor, ...]:
        """The parts of a recurrent layer's state, each [slots, *shape]: row r reads and updates slot state_slots[r].

        A row that begins finds zeros there.
        """
        return self.cache.states(layer)

    def wanted(self) -> Batch:
        """The same rows with only the tokens of logits_index as queries: the last of a row that samples, or none.

        For layers that store no keys and values: nobody reads what they make of the other tokens.
        """
        if len(self.logits_index) == self.num_tokens:
            return self
        sampled = set(map(id, self.sample_rows))
        lens = [(int(id(row) in sampled), seq_len) for row, (_, seq_len) in zip(self.rows, self.row_lens, strict=True)]
        return replace(
            self,
            input_ids=self.input_ids[self.logits_index],
            positions=self.positions[self.logits_index],
            # How many wanted tokens lie before each row's first.
            query_start=torch.searchsorted(self.logits_index, self.query_start, out_int32=True),
            logits_index=torch.arange(len(self.logits_index), device=self.logits_index.device),
            row_lens=lens,
            max_query_len=1,
        )

    @property
    def variants(self) -> tuple[str, ...]:
        """The variants of the model that this step's rows want, in order of first use."""
        return tuple(dict.fromkeys(row.variant for row in self.rows))

    def only(self, variant: str) -> tuple[Tensor, Batch]:
        """(the tokens of the rows that want a variant [T'], the batch of these rows alone)."""
        kept = [number for number, row in enumerate(self.rows) if row.variant == variant]
        ends = list(itertools.accumulate(count for count, _ in self.row_lens))
        rows, lens = [self.rows[number] for number in kept], [self.row_lens[number] for number in kept]
        stretches = [np.arange(ends[n] - self.row_lens[n][0], ends[n], dtype=np.int64) for n in kept]
        own_ends = np.cumsum([len(stretch) for stretch in stretches])
        sampled = set(map(id, self.sample_rows))
        if len(self.logits_index) == self.num_tokens:
            logits = np.arange(own_ends[-1])
        else:
            logits = np.array(
                [end - 1 for row, end in zip(rows, own_ends, strict=True) if id(row) in sampled], np.int64
            )

        def on_device(array: NDArray) -> Tensor:
            return torch.from_numpy(array).to(self.input_ids.device)

        tokens, numbers = on_device(np.concatenate(stretches)), on_device(np.array(kept, dtype=np.int64))
        part = replace(
            self,
            input_ids=self.input_ids[tokens],
            positions=self.positions[tokens],
            query_start=on_device(np.concatenate(([0], own_ends)).astype(np.int32)),
            seq_lens=self.seq_lens[numbers],
            logits_index=on_device(logits),
            state_slots=self.state_slots[numbers],
            block_tables=tuple(table[numbers] for table in self.block_tables),
            slot_mapping=tuple(slots[tokens] for slots in self.slot_mapping),
            rows=rows,
            sample_rows=[row for row in rows if id(row) in sampled],
            row_lens=lens,
            max_query_len=max(count for count, _ in lens),
        )
        return tokens, part


class Arena:
    """A stretch of host memory cut into arrays, with its mirror on the device."""

    def __init__(self, num_bytes: int, dtypes: Sequence[type[np.generic]], device: torch.device) -> None:
        """dtypes: of each array that `upload` will get, int32 or int64."""
        self._host = torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self._array = self._host.numpy()
        self._mirror = self._host if device.type == "cpu" else torch.zeros_like(self._host, device=device)
        self._copied = torch.cuda.Event() if device.type == "cuda" else None
        self._dtypes = dtypes
        self._used = 0
        #: The cut of the last step: decode steps in a row have equal shapes, and cutting costs more than copying.
        self._shapes: list[tuple[int, ...]] = []
        self._targets: list[NDArray] = []
        self._tensors: list[Tensor] = []

    def upload(self, arrays: Sequence[NDArray]) -> list[Tensor]:
        """The arrays' values on the device, until the next upload."""
        self._make_ready([array.shape for array in arrays])
        for target, array in zip(self._targets, arrays, strict=True):
            target[...] = array
        return self._send()

    def contents(self) -> tuple[list[tuple[int, ...]], memoryview]:
        """Shapes and bytes of what was uploaded last, for the arena of another process."""
        return self._shapes, self._array.data[: self._used]

    def adopt(self, shapes: list[tuple[int, ...]], contents: memoryview) -> list[Tensor]:
        """`upload` of what another arena of the same dtypes told with `contents`."""
        self._make_ready(shapes)
        self._array[: self._used] = np.frombuffer(contents, dtype=np.uint8)
        return self._send()

    def _make_ready(self, shapes: list[tuple[int, ...]]) -> None:
        if shapes != self._shapes:
            self._cut(shapes)
        if self._copied is not None:
            # A step that samples nothing waits for nothing: the last copy may still be reading what is written now.
            self._copied.synchronize()

    def _send(self) -> list[Tensor]:
        if self._copied is not None:
            self._mirror[: self._used].copy_(self._host[: self._used], non_blocking=True)
            self._copied.record(torch.cuda.current_stream(self._mirror.device))
        return self._tensors

    def _cut(self, shapes: list[tuple[int, ...]]) -> None:
        self._shapes, self._targets, self._tensors, self._used = shapes, [], [], 0
        for shape, dtype in zip(shapes, self._dtypes, strict=True):
            start, end = self._used, self._used + math.prod(shape) * np.dtype(dtype).itemsize
            self._targets.append(self._array[start:end].view(dtype).reshape(shape))
            self._tensors.append(self._mirror[start:end].view(_TORCH[dtype]).view(shape))
            self._used = -(-end // ALIGNMENT) * ALIGNMENT


class BatchBuilder:
    """Turns plans into batches.

    tables: for each group the block tables [slots, max_blocks] int32 that the block manager keeps up to date.
    """

    def __init__(
        self,
        cache: Cache,
        tables: Sequence[NDArray[np.int32]],
        *,
        max_num_batched_tokens: int,
        device: torch.device | str,
    ) -> None:
        self.cache = cache
        self.tables = tables
        #: Copies of states that no batch has told of yet.
        self._moves: list[tuple[int, int]] = []
        rows, groups = tables[0].shape[0], len(tables)
        self.table_width = tables[0].shape[1]
        #: Of a step that only decodes.
        self.max_rows = min(rows, max_num_batched_tokens)
        words = (3 + groups) * max_num_batched_tokens + 5 * rows + sum(table.size for table in tables)
        dtypes: list[type[np.generic]] = [np.int64, np.int64, np.int32, np.int32, np.int64, np.int64]
        dtypes += [np.int32] * groups + [np.int64] * groups
        self.arena = Arena(8 * words + len(dtypes) * ALIGNMENT, dtypes, torch.device(device))

    def copy_states(self, moves: Sequence[tuple[int, int]]) -> None:
        """Copy state slots (from, to) of the cache, before the next batch is built."""
        self.cache.copy_states(moves)
        self._moves += moves

    def build(self, plan: Plan, *, scoring: bool = False) -> Batch:
        """One step's batch; the plan has at least one row and at most the tokens of the budget.

        scoring: logits are wanted at every token, not only where the next one is picked.
        """
        rows, lens = plan.rows, np.array(plan.num_tokens, dtype=np.int64)
        starts = np.array([row.num_computed_tokens for row in rows], dtype=np.int64)
        ends = np.cumsum(lens)
        offsets = ends - lens
        ids, positions = _tokens(rows, plan.num_tokens, starts, lens, offsets)
        slots = np.array([row.slot for row in rows], dtype=np.int64)
        if self.cache.spec.has_states:
            self.cache.clear_states(slots[starts == 0].tolist())
        sampling = np.array(plan.samples, dtype=bool)
        query_start = np.concatenate((offsets, ends[-1:]))
        seq_lens = starts + lens
        tensors = self.arena.upload(
            [
                ids,
                positions,
                query_start,
                seq_lens,
                np.arange(len(ids)) if scoring else ends[sampling] - 1,
                slots,
                *self._tables_of(slots, int(seq_lens.max())),
                *self._slot_mapping(slots, lens, positions),
            ]
        )
        return self._batch(tensors, rows, plan.samples, list(zip(plan.num_tokens, seq_lens.tolist(), strict=True)))

    def build_decodes(self, plan: Plan, rows: int, width: int) -> Batch:
        """The batch of a step in which every row computes one token and samples, filled up to fixed sizes.

        rows: at least those of the plan. The others have a token of their own at position 0, store nothing and see the
        null block. width: blocks of a row's table, at least those of the longest context.
        """
        starts = np.array([row.num_computed_tokens for row in plan.rows], dtype=np.int64)
        ids, positions = _tokens(plan.rows, plan.num_tokens, starts, np.ones_like(starts), starts)
        slots = np.array([row.slot for row in plan.rows], dtype=np.int64)
        missing = rows - len(slots)
        tables = [np.pad(table[slots, :width], ((0, missing), (0, 0))) for table in self.tables]
        mappings = self._slot_mapping(slots, np.ones_like(slots), positions)
        tensors = self.arena.upload(
            [
                np.pad(ids, (0, missing)),
                np.pad(positions, (0, missing)),
                np.arange(rows + 1),
                np.pad(starts + 1, (0, missing), constant_values=1),
                np.arange(rows),
                np.pad(slots, (0, missing)),
                *tables,
                *(np.pad(mapping, (0, missing), constant_values=-1) for mapping in mappings),
            ]
        )
        lens = [(1, seen) for seen in (starts + 1).tolist()]
        return replace(self._batch(tensors, plan.rows, plan.samples, lens), is_filled_up=True)

    def rebuild(
        self,
        tensors: list[Tensor],
        rows: list[Request],
        samples: Sequence[bool],
        row_lens: list[tuple[int, int]],
        moves: Sequence[tuple[int, int]],
    ) -> Batch:
        """The batch that another process built, from what its arena held; this one's cache follows."""
        self.copy_states(moves)
        if self.cache.spec.has_states:
            slots = tensors[5].tolist()
            self.cache.clear_states([slot for slot, (new, seen) in zip(slots, row_lens, strict=True) if new == seen])
        return self._batch(tensors, rows, samples, row_lens)

    def _batch(
        self, tensors: list[Tensor], rows: list[Request], samples: Sequence[bool], row_lens: list[tuple[int, int]]
    ) -> Batch:
        input_ids, positions, query_start, seq_lens, logits_index, state_slots, *grouped = tensors
        moves, self._moves = self._moves, []
        return Batch(
            input_ids=input_ids,
            positions=positions,
            query_start=query_start,
            seq_lens=seq_lens,
            logits_index=logits_index,
            state_slots=state_slots,
            block_tables=tuple(grouped[: len(self.tables)]),
            slot_mapping=tuple(grouped[len(self.tables) :]),
            rows=rows,
            sample_rows=[row for row, sampled in zip(rows, samples, strict=True) if sampled],
            row_lens=row_lens,
            max_query_len=max(new for new, _ in row_lens),
            cache=self.cache,
            arena=self.arena,
            moves=moves,
        )

    def _tables_of(self, slots: NDArray, longest: int) -> list[NDArray]:
        """Per group [R, blocks of the longest context]."""
        width = -(-longest // self.cache.block_size)
        return [table[slots, :width] for table in self.tables]

    def _slot_mapping(self, slots: NDArray, lens: NDArray, positions: NDArray) -> list[NDArray]:
        """Per group [T]: block * block_size + offset of each token."""
        size = self.cache.block_size
        row_slots = slots if len(positions) == len(slots) else np.repeat(slots, lens)
        blocks, offsets = np.divmod(positions, size)
        return [table[row_slots, blocks] * size + offsets for table in self.tables]


def _tokens(
    rows: list[Request], num_tokens: list[int], starts: NDArray, lens: NDArray, offsets: NDArray
) -> tuple[NDArray, NDArray]:
    """input_ids [T] and positions [T]; a step of decodes alone has one token a row and takes the short way."""
    if len(rows) == int(lens.sum()):
        computed = starts.tolist()
        ids = [row.token_ids[start] for row, start in zip(rows, computed, strict=True)]
        return np.array(ids, dtype=np.int64), starts
    flat: list[int] = []
    for row, start, count in zip(rows, starts.tolist(), num_tokens, strict=True):
        flat += row.token_ids[start : start + count]
    return np.array(flat, dtype=np.int64), np.arange(len(flat)) + np.repeat(starts - offsets, lens)
