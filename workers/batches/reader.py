"""Turns a line of the input into the job that runs it, and a job's answer into the line's."""

import base64
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from inferfleet.tasks import strict_json
from inferfleet.tasks.batches import BatchRecord, Ended
from inferfleet.tasks.contracts import ChatCompletionRequest, JobRequest, ResponseRequest, check_card, validated
from inferfleet.tasks.errors import UnsupportedFeature
from inferfleet.workers.batches.spool import Spool

#: Priorities of lines lie behind those of online work, whose own is 0 if none is given: -100..100 becomes 50..100.
FIRST_PRIORITY, LAST_PRIORITY = 50, 100
#: Workers come and go: their cards are asked for again after this.
CARDS_SECONDS = 5.0

#: Model -> what its workers say about it.
Cards = dict[str, dict[str, Any]]
#: Id of a picture -> its url and the Unix second until which that works.
Link = Callable[[str], tuple[str, int]]


@dataclass(frozen=True)
class Prepared:
    """A line as a job."""

    custom_id: str
    job: JobRequest
    priority: int
    #: Its own deadline comes before the batch's.
    own_deadline: bool


def line_priority(given: int) -> int:
    """-100..100, lower runs first, as the same order among lines of batches."""
    return FIRST_PRIORITY + (given + 100) * (LAST_PRIORITY - FIRST_PRIORITY) // 200


class LineReader:
    """Reads the lines of one batch, whose plan has found them valid as lines."""

    def __init__(self, spool: Spool, batch: BatchRecord, cards: Callable[[], Cards], link: Link) -> None:
        self._spool = spool
        self._batch = batch
        self._ask_cards = cards
        self._link = link
        self._cards: Cards = {}
        self._cards_until = 0.0

    def custom_id(self, number: int) -> str:
        found: str = strict_json.loads(self._spool.line(number))["custom_id"]
        return found

    def read(self, number: int) -> Prepared:
        """Raises InvalidRequest and others that name the field of the body."""
        line = strict_json.loads(self._spool.line(number))
        job = validated(JobRequest, line)
        if isinstance(job.body, ChatCompletionRequest | ResponseRequest) and job.body.stream:
            raise UnsupportedFeature("stream is not served in a batch", param="body.stream")
        if isinstance(job.body, ResponseRequest) and job.body.background:
            # Its id could not be asked for: the line in the file is all that is left of it.
            raise UnsupportedFeature("background is not served in a batch", param="body.background")
        if (card := self._card(job.body.model)) is not None:
            check_card(job.body, card)
        if job.callback is not None:
            raise UnsupportedFeature("a line has no webhook; its batch may have one", param="webhook")
        own = job.deadline_ms is not None and job.deadline_ms < self._batch.expires_ms
        return Prepared(line["custom_id"], job, line_priority(self._wish(job)), own)

    def _wish(self, job: JobRequest) -> int:
        """The priority that the line names, by number or by tier, else the batch's."""
        return self._batch.priority if job.wished_priority is None else job.wished_priority

    def _card(self, model: str) -> dict[str, Any] | None:
        if time.monotonic() >= self._cards_until:
            self._cards = self._ask_cards()
            self._cards_until = time.monotonic() + CARDS_SECONDS
        return self._cards.get(model)

    def with_pictures(self, ended: Ended, picture: Callable[[dict[str, Any]], bytes]) -> tuple[bytes, bool]:
        """The answer's body, its pictures in it as they were asked for, and whether that is as urls: else in base64."""
        if not ended.outputs:
            return ended.response, False
        body = json.loads(ended.response)
        as_url = body.pop("response_format", "url") == "url"
        outputs: Mapping[int, dict[str, Any]] = {output["index"]: output for output in ended.outputs}
        for entry in body["data"]:
            output = outputs[entry["index"]]
            if as_url:
                entry["url"], entry["url_expires_at"] = self._link(output["id"])
            else:
                entry["b64_json"] = base64.b64encode(picture(output)).decode()
        return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode(), as_url
