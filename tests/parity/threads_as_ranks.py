"""A split model whose ranks are threads of this process: the same layers and shares, without starting processes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from inferfleet.engine.families import Model, load_model
from inferfleet.engine.group import Group

SECONDS = 60
T = TypeVar("T")


class Meeting:
    """Where threads exchange tensors."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size, timeout=SECONDS)
        self.brought: list[Tensor] = [torch.empty(0)] * size

    def exchange(self, rank: int, x: Tensor) -> list[Tensor]:
        self.brought[rank] = x
        self.barrier.wait()
        found = list(self.brought)
        self.barrier.wait()
        return found


class ThreadGroup(Group):
    """One thread's view of the meeting."""

    def __init__(self, rank: int, meeting: Meeting) -> None:
        self.rank, self.size, self.meeting = rank, meeting.size, meeting

    def sum(self, x: Tensor) -> Tensor:
        return torch.stack(self.meeting.exchange(self.rank, x)).sum(0)

    def gather(self, x: Tensor, whole: int) -> Tensor:
        parts = torch.cat(self.meeting.exchange(self.rank, x), dim=1)
        assert parts.shape[1] == whole
        return parts


def on_every_rank(size: int, work: Callable[[int], T]) -> list[T]:
    """work(rank) in `size` threads at once; raises what the first that failed raised."""
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(work, range(size)))


def load_split(folder: Path, size: int, **settings: Any) -> list[Model]:
    """The checkpoint in float32, one model for each rank."""
    meeting = Meeting(size)
    groups = [ThreadGroup(rank, meeting) for rank in range(size)]
    return [load_model(str(folder), dtype="float32", device="cpu", group=group, **settings).model for group in groups]
