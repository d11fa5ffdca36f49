"""Says something to the ledger or the store until it answers. For what must not be lost while one of them restarts."""

import threading
from collections.abc import Callable
from typing import TypeVar

from inferfleet.tasks.errors import LedgerUnavailable, StoreUnavailable
from inferfleet.workers import logs

T = TypeVar("T")

_FIRST_WAIT = 0.1
_LONGEST_WAIT = 2.0

log = logs.get("ledger")


def until_answered(call: Callable[[], T], give_up: threading.Event) -> T:
    """The answer of `call`, repeated while ledger or store are unavailable. Raises their error once `give_up` is set.

    Every call of theirs may be repeated: a lost reply changes nothing.
    """
    wait = _FIRST_WAIT
    while True:
        try:
            return call()
        except (LedgerUnavailable, StoreUnavailable) as error:
            if give_up.wait(wait):
                raise
            log.warning(error.code, reason=error.message, retry_seconds=wait)
            wait = min(2 * wait, _LONGEST_WAIT)
