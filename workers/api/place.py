"""How far one reader has come in one job's event log: it takes what the hub brings, or reads the log itself."""

import json

from inferfleet.tasks import calls, names
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
        self.ended = False
        self.missing = False
        self.more = False

    async def read_log(self) -> list[Event]:
        """One page of the log itself; `more` says that another may follow."""
        state, events = await self._ledger.run(calls.log(self._job_id, self._tenant, after=self.after))
        self.more, self.missing = len(events) == calls.EVENTS_PER_READ, False
        if events:
            self.after = events[-1]["sequence_number"]
        # A job that was retried has an earlier end in its numbers: the state decides, and only on the last page.
        self.ended = state in names.TERMINAL and not self.more
        return events

    def accept(self, entries: list[Entry]) -> list[Event]:
        """The new ones among entries that the hub brought; `missing` = there is a hole before them, read the log."""
        fresh = [entry for entry in entries if entry[0] > self.after]
        self.missing = bool(fresh) and fresh[0][0] != self.after + 1
        if self.missing or not fresh:
            return []
        self.after = fresh[-1][0]
        events = [{"sequence_number": number, **json.loads(body)} for number, body in fresh]
        self.ended = names.is_terminal_event(events[-1]["type"])
        return events
