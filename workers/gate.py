"""Who may enter an engine: all together, or one alone. Knows no job and no engine.

A job that may have brought an engine down is run alone, so that it cannot take others with it again; while it waits,
nobody new enters, so it waits only for those inside.
"""

import threading


class Gate:
    """A shared-exclusive lock whose waiters can be turned away."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside = 0
        self._alone_inside = False
        self._alone_waiting = 0

    def enter(self, alone: bool, turned_away: threading.Event, timeout: float | None) -> bool:
        """Wait for entrance; False when `turned_away` was set (see `recheck`) or the timeout passed first."""
        with self._changed:
            self._alone_waiting += alone
            try:
                self._changed.wait_for(lambda: turned_away.is_set() or self._open_for(alone), timeout)
                if turned_away.is_set() or not self._open_for(alone):
                    return False
                self._inside += 1
                self._alone_inside = alone
                return True
            finally:
                self._alone_waiting -= alone
                self._changed.notify_all()

    def leave(self) -> None:
        """One who entered goes."""
        with self._changed:
            self._inside -= 1
            self._alone_inside = False
            self._changed.notify_all()

    def recheck(self) -> None:
        """Let the waiters look at their `turned_away` again."""
        with self._changed:
            self._changed.notify_all()

    def _open_for(self, alone: bool) -> bool:
        if alone:
            return self._inside == 0
        return not self._alone_inside and self._alone_waiting == 0
