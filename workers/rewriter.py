"""Has Redis write its append-only file anew once after each of its starts, whoever starts it.

A Redis that died in the middle of a write may go on writing behind the half of a script (torn_file.py), and lose or
damage what stands around it at its next start. From outside nobody sees that; a new file holds what is in memory, and
nothing of that half. Redis itself knows whether it has written one since its start, so nobody else has to remember.
"""

import time
from collections.abc import Mapping
from typing import Any

import redis
from redis import exceptions

from inferfleet.tasks.ledger import as_unavailable, refuses_writes
from inferfleet.workers import logs

log = logs.get("rewriter")

RETRY_SECONDS = 60.0
#: What a server says that was asked twice.
RUNNING = "already in progress"


class Rewriter:
    """One a worker; several at once are harmless, because a server refuses a second rewrite while one runs."""

    def __init__(self, client: "redis.Redis") -> None:
        self._client = client
        self._quiet_until = 0.0
        self._told = ""

    def round(self) -> None:
        """Look, and ask if it is due. A server that refuses is told of once, and asked again now and then.

        Raises LedgerUnavailable.
        """
        if time.monotonic() < self._quiet_until:
            return
        with as_unavailable():
            try:
                self._ask_if_due(self._client.info("persistence"))
            except exceptions.ResponseError as error:
                if refuses_writes(error):
                    raise
                if RUNNING not in str(error):
                    self._wait(str(error))

    def _ask_if_due(self, info: Mapping[str, Any]) -> None:
        if not is_due(info):
            return
        if has_failed(info):
            self._wait("the last rewrite failed; the log of Redis says why")
        self._client.bgrewriteaof()
        log.info("append_only_file_rewrite_asked")

    def _wait(self, reason: str) -> None:
        self._quiet_until = time.monotonic() + RETRY_SECONDS
        if reason != self._told:
            log.warning("append_only_file_not_rewritten", reason=reason)
            self._told = reason


def is_due(info: Mapping[str, Any]) -> bool:
    """Whether a server, by its INFO persistence, has to be asked: it writes a file, and wrote no new one since its
    start. Not while it cannot write: a rewrite that fails leaves the file in two parts, of which it mends the last."""
    busy = info.get("loading") or info.get("aof_rewrite_in_progress") or info.get("aof_rewrite_scheduled")
    writes = info.get("aof_enabled") and info.get("aof_last_write_status", "ok") == "ok"
    done = info.get("aof_last_rewrite_time_sec", -1) >= 0 and not has_failed(info)
    return bool(writes and not busy and not done)


def has_failed(info: Mapping[str, Any]) -> bool:
    """Whether the last rewrite since the server's start came to nothing."""
    return bool(info.get("aof_last_bgrewrite_status", "ok") != "ok")
