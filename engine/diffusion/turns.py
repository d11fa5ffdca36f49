"""What the diffusion engine does next: prepare a request, move one group of pictures by a step, or paint one. No torch.

Pictures whose tensors have one shape form a group and can share a step of the transformer, wherever each stands. One
unit of work at a time:

    Prepare   a request's prompt (and init image), so that its pictures can move
    Move      one step of at most max_batch_size pictures of one group
    Paint     one picture that has all its steps

What is done comes first: a picture that waits to be painted holds memory and somebody waits for it, and no more of them
come than moved in the last step. Then requests are prepared, as long as their group has seats free, at most
max_batch_size between two moves. Then the group moves that has waited longest.

Within a group a started picture keeps its seat until it is done; free seats go by priority (lower first), then arrival.

Why nobody waits for ever: a move takes every seated picture of its group forward, groups take turns, so a seated
picture of s steps is done after s * (number of groups) moves, and of those that wait for a seat the first one takes the
next that is free. Only requests of a better priority can come before it.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Group(NamedTuple):
    """Sizes of the tensors of a picture: latent rows and columns, tokens of the prompt's sequence."""

    height: int
    width: int
    length: int


@dataclass(slots=True, eq=False)
class Row:
    """One picture on its way."""

    id: str
    index: int
    group: Group
    #: Steps that it takes.
    num_steps: int
    #: Lower goes first.
    priority: int = 0
    #: Order of arrival of its request.
    arrival: int = 0
    num_done: int = 0

    @property
    def key(self) -> tuple[int, int, int]:
        return self.priority, self.arrival, self.index


@dataclass(frozen=True, slots=True)
class Prepare:
    id: str


@dataclass(frozen=True, slots=True)
class Move:
    rows: tuple[Row, ...]


@dataclass(frozen=True, slots=True)
class Paint:
    row: Row


Unit = Prepare | Move | Paint


class _Queue:
    """The pictures of one group, in order."""

    def __init__(self, seats: int) -> None:
        #: Pictures that move in one step; fewer than the engine's once memory did not suffice for them.
        self.seats = seats
        self.seated: list[Row] = []
        self.ready: list[Row] = []
        self.unprepared: list[Row] = []
        #: Number of the last move of this group, or of the move before its first picture came.
        self.last_moved = 0

    def __len__(self) -> int:
        return len(self.seated) + len(self.ready) + len(self.unprepared)

    def remove(self, request_id: str) -> None:
        for rows in (self.seated, self.ready, self.unprepared):
            rows[:] = [row for row in rows if row.id != request_id]

    def fill(self) -> list[Row]:
        """Gives free seats away and returns who moves: no more than there are seats, the first first."""
        while self.ready and len(self.seated) < self.seats:
            insort(self.seated, self.ready.pop(0), key=_key)
        return self.seated[: self.seats]


class Turns:
    """All pictures that are not painted yet."""

    def __init__(self, max_batch_size: int) -> None:
        if max_batch_size < 1:
            raise ValueError(f"max_batch_size must be at least 1, not {max_batch_size}")
        self.max_batch_size = max_batch_size
        self._queues: dict[Group, _Queue] = {}
        self._done: list[Row] = []
        self._num_moves = 0
        self._num_prepared = 0

    @property
    def has_work(self) -> bool:
        return bool(self._done or self._queues)

    @property
    def num_seated(self) -> int:
        return len(self._done) + sum(len(queue.seated) for queue in self._queues.values())

    @property
    def num_waiting(self) -> int:
        return sum(len(queue.ready) + len(queue.unprepared) for queue in self._queues.values())

    @property
    def num_groups(self) -> int:
        return len(self._queues)

    def add(self, rows: Sequence[Row]) -> None:
        """Take the pictures of one request, all of one group; they move once `prepared` was said."""
        group = rows[0].group
        queue = self._queues.get(group)
        if queue is None:
            queue = self._queues[group] = _Queue(self.max_batch_size)
            queue.last_moved = self._num_moves
        for row in rows:
            insort(queue.unprepared, row, key=_key)

    def next(self) -> Unit | None:
        """What to do now; None if there is nothing."""
        if self._done:
            return Paint(self._done[0])
        able = [queue for queue in self._queues.values() if queue.seated or queue.ready]
        if (not able or self._num_prepared < self.max_batch_size) and (first := self._to_prepare()) is not None:
            return Prepare(first)
        if not able:
            return None
        # Groups that have waited equally long: the one with the picture that goes first.
        queue = min(able, key=lambda queue: (queue.last_moved, min(_key(row) for row in queue.seated + queue.ready)))
        return Move(tuple(queue.fill()))

    def prepared(self, request_id: str) -> None:
        """The request's pictures may move from now on."""
        self._num_prepared += 1
        for queue in self._queues.values():
            for row in [row for row in queue.unprepared if row.id == request_id]:
                queue.unprepared.remove(row)
                insort(queue.ready, row, key=_key)

    def moved(self, group: Group, rows: Sequence[Row]) -> None:
        """A move of the group is over, and these are its pictures that took the step."""
        self._num_moves, self._num_prepared = self._num_moves + 1, 0
        queue = self._queues.get(group)
        if queue is None:
            return
        queue.last_moved = self._num_moves
        for row in rows:
            row.num_done += 1
            if row.num_done == row.num_steps:
                queue.seated.remove(row)
                self._done.append(row)
        self._forget_empty()

    def painted(self, row: Row) -> None:
        self._done.remove(row)

    def shrink(self, group: Group, seats: int) -> None:
        """Memory does not suffice for more pictures of this group; holds until the group is empty."""
        if (queue := self._queues.get(group)) is not None:
            queue.seats = max(1, min(queue.seats, seats))

    def drop(self, request_id: str) -> None:
        """A request is over, wherever its pictures are."""
        self._done = [row for row in self._done if row.id != request_id]
        for queue in self._queues.values():
            queue.remove(request_id)
        self._forget_empty()

    def _to_prepare(self) -> str | None:
        """The first request whose group has a seat for it; prepared earlier, it would only take memory."""
        waiting = [
            queue.unprepared[0]
            for queue in self._queues.values()
            if queue.unprepared and len(queue.seated) + len(queue.ready) < queue.seats
        ]
        return min(waiting, key=_key).id if waiting else None

    def _forget_empty(self) -> None:
        self._queues = {group: queue for group, queue in self._queues.items() if queue}


def _key(row: Row) -> tuple[int, int, int]:
    return row.key
