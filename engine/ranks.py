"""Joins the processes of a split model by torch.distributed: gloo on a CPU, NCCL between GPUs.

A sum gathers what every rank brings and adds it in the order of the ranks, so that a row's result does not depend on
how many rows come with it (a ring adds each stretch of the buffer in another order). Two ranks move as many bytes
that way as a ring does, more ranks more.
"""

from __future__ import annotations

import os
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inferfleet.engine.errors import GroupBroken
from inferfleet.engine.group import Group, stretch

#: How long a rank waits for the others inside a step. They are never further apart than two products are.
COLLECTIVE_SECONDS = 60.0


class Ranks(Group):
    """One process's membership. Sums and gathers work from `connect` to `close`."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        #: Rank 0: what the other ranks said is free on their devices.
        self.free_elsewhere: list[int] = []
        self._processes: Any = None

    def connect(self, meeting_point: Path, device: torch.device, seconds: float) -> None:
        """Wait for all ranks at a file that they agreed on. GroupBroken if they do not come."""
        try:
            self._processes = _join(meeting_point, self.rank, self.size, device, timedelta(seconds=seconds))
        except RuntimeError as error:
            raise GroupBroken(f"rank {self.rank} could not meet the others: {error}") from error

    def close(self) -> None:
        """End what is under way, from any thread."""
        processes, self._processes = self._processes, None
        if processes is not None:
            processes.abort()

    def share_of_memory(self, free: int, device: torch.device) -> int:
        """Ranks on one CPU share what is free; of several GPUs the fullest decides."""
        return free // self.size if device.type == "cpu" else min([free, *self.free_elsewhere])

    def sum(self, x: Tensor) -> Tensor:
        first, second, *others = self._from_all(x)
        if not others:
            return first + second
        total = first.float() + second
        for part in others:
            total += part
        return total.to(x.dtype)

    def gather(self, x: Tensor, whole: int) -> Tensor:
        widths = [end - begin for begin, end in (stretch(whole, rank, self.size) for rank in range(self.size))]
        # All bring the same number of columns; the last one of a narrower rank is a filler.
        padded = x if x.shape[1] == max(widths) else torch.nn.functional.pad(x, (0, 1))
        parts = self._from_all(padded)
        return torch.cat([part[:, :width] for part, width in zip(parts, widths, strict=True)], dim=1)

    def _from_all(self, x: Tensor) -> list[Tensor]:
        """x of every rank, in order."""
        x = x.contiguous()
        out = torch.empty(self.size * x.numel(), dtype=x.dtype, device=x.device)
        if self._processes is None:
            raise GroupBroken(f"rank {self.rank} is not connected")
        try:
            self._processes._allgather_base(out, x.view(-1)).wait()
        except RuntimeError as error:
            raise GroupBroken(f"rank {self.rank} waited for the others in vain: {error}") from error
        return list(out.view(self.size, *x.shape).unbind())


def _join(meeting_point: Path, rank: int, size: int, device: torch.device, timeout: timedelta) -> Any:
    """A process group of its own, beside torch's global one: several models may live in one process."""
    dist: Any = import_module("torch.distributed")  # what it binds has no types
    store = dist.FileStore(str(meeting_point), size)
    store.set_timeout(timeout)
    if device.type == "cuda":
        # All ranks are on this machine.
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        return dist.ProcessGroupNCCL(store, rank, size, options)
    options = dist.ProcessGroupGloo._Options()
    options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
    options._timeout = timeout
    return dist.ProcessGroupGloo(store, rank, size, options)
