"""How far one reader has come in one job's event log: it takes what the hub brings, or reads the log itself."""

import json

from inferfleet.tasks import event_log, names
from inferfleet.tasks.ledger import AsyncLedger
from inferfleet.tasks.records import Event

#: (number of the event, its JSON without the number)
Entry = tuple[int, bytes]


class Place:
    """One reader's place: `after` is the number of the last event it has seen."""

    def __init__(self, ledger: AsyncLedger, job_id: str, tenant: str | None, after: int) -> None:
        self._ledger = ledger
        self._job_id = job_id
        self._tenant = tenant
        self.after = after
        self._last: Event | None = None
        self.ended = False
        self.missing = False
        self.more = False

    async def read_log(self) -> list[Event]:
        """One page of the log itself; `more` says that another may follow. Raises Conflict as `event_log.log`."""
        log = event_log.log(self._job_id, self._tenant, after=self.after, last=self._last)
        state, events = await self._ledger.run(log)
        self.more, self.missing = len(events) == event_log.EVENTS_PER_READ, False
        self._see(events)
        # A job that was retried has an earlier end in its numbers: the state decides, and only on the last page.
        self.ended = state in names.TERMINAL and not self.more
        return events

    def accept(self, entries: list[Entry]) -> list[Event]:
        """The new ones among entries that the hub brought; `missing` = there is a hole before them, read the log."""
        fresh = [entry for entry in entries if entry[0] > self.after]
        self.missing = bool(fresh) and fresh[0][0] != self.after + 1
        if self.missing or not fresh:
            return []
        events = [{"sequence_number": number, **json.loads(body)} for number, body in fresh]
        self._see(events)
        self.ended = names.is_terminal_event(events[-1]["type"])
        return events

    def _see(self, events: list[Event]) -> None:
        if events:
            self._last = events[-1]
            self.after = events[-1]["sequence_number"]
