"""Workers of one machine look after each other: a process that is gone has lost its jobs, and no lease need end first.

Only what the kernel says for sure counts: a process that stands still keeps its leases, and one that cannot be looked
at is alive. A machine is told by its boot, its host name and its process namespace, so containers are machines of their
own. Where there is no /proc nobody is looked after; leases end as ever.
"""

import os
import socket
from pathlib import Path

from inferfleet.tasks.ledger import Ledger

PROC = Path("/proc")
#: Of the fields of /proc/PID/stat behind the command's name.
STATE, STARTED = 0, 19
DEAD = "ZX"


def this_machine() -> str | None:
    """What only processes that see the same process ids have in common; None where that cannot be told."""
    try:
        boot = (PROC / "sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()}:{boot}:{os.readlink(PROC / 'self/ns/pid')}"
    except OSError:
        return None


def stat_of(pid: int) -> list[str] | None:
    """State and what follows it; None if it cannot be read."""
    try:
        return (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except (OSError, UnicodeDecodeError):
        return None


def is_gone(pid: int, started: str) -> bool:
    """Whether the process that bore this id, and started at that tick of the clock, is no more."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    stat = stat_of(pid)
    return stat is not None and (stat[STATE] in DEAD or stat[STARTED] != started)


class Neighbours:
    """One worker's view of those on its machine. `ttl_seconds`: longer than a lease, or a loss may go unseen."""

    def __init__(self, ledger: Ledger, worker: str, ttl_seconds: float) -> None:
        self._ledger = ledger
        self._worker = worker
        self._ttl = ttl_seconds
        self._machine = this_machine()
        stat = stat_of(os.getpid())
        self._info = None if stat is None else {"pid": os.getpid(), "started": stat[STARTED]}

    def announce(self) -> None:
        """Say that this worker lives here."""
        if self._machine is not None and self._info is not None:
            self._ledger.put_neighbour(self._machine, self._worker, self._info, self._ttl)

    def gone(self) -> list[str]:
        """Those whose process is no more."""
        if self._machine is None:
            return []
        others = self._ledger.neighbours(self._machine)
        return [name for name, info in others.items() if name != self._worker and is_gone(**info)]

    def forget(self, worker: str) -> None:
        """Its jobs are taken back."""
        if self._machine is not None:
            self._ledger.put_neighbour(self._machine, worker, {}, 0)
