"""Turns a job's events into the events of an OpenAI response stream. Pure: no Redis, no HTTP.

The numbers of a stream are not those of the job's log, of which one event may make several here. They are counted anew
from the log's beginning each time, and the log never changes, so an event has the same number for every reader.
"""

from collections.abc import Iterator
from typing import Any

from inferfleet.tasks import names
from inferfleet.tasks.contracts import ResponseRequest
from inferfleet.tasks.response_object import Status, message, message_id, response_object, text_part

Event = dict[str, Any]
PLACE = {"output_index": 0, "content_index": 0}


class ResponseEvents:
    """The events of one response, in order: what came before the text, the text, how it ended."""

    def __init__(self, request: ResponseRequest, job_id: str, created_at: int) -> None:
        self._request = request
        self._job_id = job_id
        self._created_at = created_at
        self._number = -1
        self._status: Status | None = None
        self._text = ""
        self._is_open = False

    def of(self, event: Event) -> Iterator[Event]:
        """Those that an event of the job's log makes; its end makes none, see `closing`."""
        kind = event["type"]
        if kind == "job.queued" and self._status is None:
            yield self._about("response.created", "queued")
            if self._request.background:
                yield self._about("response.queued", "queued")
        elif kind == "job.in_progress" and self._status != "in_progress":
            yield self._about("response.in_progress", "in_progress")
        elif kind == names.DELTA and event["delta"]:
            yield from self._opening()
            self._text += event["delta"]
            yield self._numbered(
                {"type": kind, "item_id": self._item_id, **PLACE, "delta": event["delta"], "logprobs": []}
            )

    def closing(self, response: dict[str, Any]) -> Iterator[Event]:
        """The last ones. response: as it is once it has ended."""
        status = response["status"]
        if status in ("completed", "incomplete"):
            yield from self._opening()
            part = text_part(self._text)
            yield self._numbered(
                {"type": "response.output_text.done", "item_id": self._item_id, **PLACE, "text": self._text,
                 "logprobs": []}
            )  # fmt: skip
            yield self._numbered(
                {"type": "response.content_part.done", "item_id": self._item_id, **PLACE, "part": part}
            )
            item = message(self._job_id, self._text, status)
            yield self._numbered({"type": "response.output_item.done", "output_index": 0, "item": item})
        yield self._numbered({"type": f"response.{status}", "response": response})

    def error(self, error: dict[str, Any]) -> Event:
        """Reading went wrong; the response itself goes on."""
        said = {name: error.get(name) for name in ("code", "message", "param")}
        return self._numbered({"type": "error", **said})

    @property
    def _item_id(self) -> str:
        return message_id(self._job_id)

    def _opening(self) -> Iterator[Event]:
        if self._is_open:
            return
        self._is_open = True
        item = message(self._job_id, "", "in_progress")
        yield self._numbered({"type": "response.output_item.added", "output_index": 0, "item": item})
        part = text_part("")
        yield self._numbered({"type": "response.content_part.added", "item_id": self._item_id, **PLACE, "part": part})

    def _about(self, kind: str, status: Status) -> Event:
        self._status = status
        response = response_object(self._request, self._job_id, self._created_at, status)
        return self._numbered({"type": kind, "response": response})

    def _numbered(self, event: Event) -> Event:
        self._number += 1
        return {**event, "sequence_number": self._number}
