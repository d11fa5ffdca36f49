"""How the models of one worker share it: how many jobs of each it carries at once.

A worker has `slots` threads for all its models. Were they given to whoever comes, a long queue of one model would fill
them all, and the others would wait behind it though their engines idle. So each model has a share that no other may
take: what its engine runs in one step, at most an equal part of the slots. The rest goes to whoever comes first.

An image model carries no more than twice what its engine runs in one step, in jobs and in pictures, because what its
jobs hold lies in the worker's memory: an init image before they start, pictures until they are stored. (A job is let
in while there is room for one picture, so the last one may bring some more.)

The processors are shared by priority: see `Resident`.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass

from inferfleet.workers.resident import Resident


@dataclass
class Load:
    """What is carried of one model."""

    jobs: int = 0
    #: Pictures of an image model; jobs of another.
    weight: int = 0


class Seats:
    """Counts what is carried. Many threads use one."""

    def __init__(self, slots: int, residents: Sequence[Resident], reserved: int = 0) -> None:
        """reserved: seats of a model that lines of batches leave free."""
        self._slots = slots
        self._reserved = reserved
        self._residents = list(residents)
        self._loads = {resident.model: Load() for resident in residents}
        self._lock = threading.Lock()

    def take(self, resident: Resident) -> bool:
        """Take a seat for one job, if there is one. It weighs 1 until `weigh` says more."""
        with self._lock:
            if not self._has_room(resident):
                return False
            load = self._loads[resident.model]
            load.jobs += 1
            load.weight += 1
            return True

    def weigh(self, resident: Resident, more: int) -> None:
        """The job in a seat weighs more (or less, again) than it was taken for."""
        with self._lock:
            self._loads[resident.model].weight += more

    def leave(self, resident: Resident) -> None:
        """Give a seat back."""
        with self._lock:
            load = self._loads[resident.model]
            load.jobs -= 1
            load.weight -= 1

    def has_room(self, resident: Resident) -> bool:
        """Whether another job of this model may be claimed."""
        with self._lock:
            return self._has_room(resident)

    def serves_lines(self, resident: Resident, *, another: bool = False) -> bool:
        """Whether who has just taken a seat may carry a line of a batch on it; or `another` one may, too."""
        with self._lock:
            limit = self.limit(resident)
            free = limit - self._loads[resident.model].jobs - another
            return free >= min(self._reserved, limit - 1)

    def limit(self, resident: Resident) -> int:
        """Jobs of a model that are carried at once."""
        others = sum(self._share(other) for other in self._residents if other is not resident)
        limit = max(1, self._slots - others)
        return min(limit, 2 * resident.batch_size) if resident.kind == "image" else limit

    def _share(self, resident: Resident) -> int:
        return max(1, min(resident.batch_size, self._slots // len(self._residents)))

    def _has_room(self, resident: Resident) -> bool:
        load = self._loads[resident.model]
        if resident.kind == "image" and load.weight >= 2 * resident.batch_size:
            return False
        limit = self.limit(resident)
        # Where a model may have all the slots, the threads themselves are the limit, and its turns need no watch.
        return limit >= self._slots or load.jobs < limit
