"""Has Redis write its append-only file anew once after each of its starts, whoever starts it.

A Redis that died in the middle of a write may go on writing behind the half of a script (torn_file.py). From outside
nobody sees that; a new file holds what is in memory, and nothing of that half. Redis itself knows whether it has
written one since its start, so nobody else has to remember. One that dies again before the new file is whole may refuse
its next start ("the truncated file is not the last file"), but has cut the old one rightly then: the next goes well.
"""

import time
from collections.abc import Mapping
from typing import Any

import redis
from redis import exceptions

from inferfleet.tasks.ledger import as_unavailable, refuses_writes
from inferfleet.workers import logs

log = logs.get("rewriter")

#: A server that refuses is left alone for so long.
REFUSED_SECONDS = 600.0
#: What a server says that was asked twice.
RUNNING = "already in progress"


class Rewriter:
    """One a worker; several at once are harmless, because a server refuses a second rewrite while one runs."""

    def __init__(self, client: "redis.Redis") -> None:
        self._client = client
        self._quiet_until = 0.0
        self._told = ""

    def round(self) -> None:
        """Look, and ask if it is due. Raises LedgerUnavailable; what else is in the way is told of once."""
        if time.monotonic() < self._quiet_until:
            return
        with as_unavailable():
            try:
                info = self._client.info("persistence")
                self._tell("it failed; the log of Redis says why" if has_failed(info) else "")
                if is_due(info):
                    self._client.bgrewriteaof()
                    log.info("append_only_file_rewrite_asked")
            except exceptions.ResponseError as error:
                if refuses_writes(error):
                    raise
                if RUNNING not in str(error):
                    self._quiet_until = time.monotonic() + REFUSED_SECONDS
                    self._tell(str(error))

    def _tell(self, reason: str) -> None:
        if reason and reason != self._told:
            log.warning("append_only_file_not_rewritten", reason=reason)
        self._told = reason or self._told


def is_due(info: Mapping[str, Any]) -> bool:
    """Whether a server, by its INFO persistence, has to be asked: it keeps a file, and nobody had it write a new one
    since its start. Not before the disk takes writes. One that failed is not repeated, because each leaves a file."""
    busy = info.get("loading") or info.get("aof_rewrite_in_progress") or info.get("aof_rewrite_scheduled")
    writes = info.get("aof_enabled") and info.get("aof_last_write_status", "ok") == "ok"
    return bool(writes and not busy and not has_failed(info) and info.get("aof_last_rewrite_time_sec", -1) < 0)


def has_failed(info: Mapping[str, Any]) -> bool:
    """Whether the last rewrite since the server's start came to nothing."""
    return bool(info.get("aof_last_bgrewrite_status", "ok") != "ok")
