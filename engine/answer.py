"""The text of one answer as it grows: tokens in, text that is certain out. No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from inferfleet.engine.output import Delta
from inferfleet.engine.request import Request
from inferfleet.engine.text.detokenizer import IncrementalDetokenizer, Vocabulary
from inferfleet.engine.text.stop import StopChecker

if TYPE_CHECKING:
    from inferfleet.engine.sampler import RowState


class Answer:
    """One Request with its text and its sampling state.

    A requeued request brings tokens and text that were published: the tokens are read again, so that code points and
    stop strings that begin in them go on, and their text is not given out twice.
    """

    def __init__(self, request: Request, state: RowState, vocabulary: Vocabulary, published_text: str = "") -> None:
        self.request = request
        self.state = state
        self._detokenizer = IncrementalDetokenizer(vocabulary)
        self._stop = StopChecker(request.sampling.stop)
        self._count = 0
        replayed = "".join(self._read(token) for token in request.output_token_ids)
        #: Certain text that the published text lacks, and how much of it is ahead of what is certain here.
        self._owed = replayed[len(published_text) :]
        self._ahead = max(0, len(published_text) - len(replayed))

    @property
    def stopped(self) -> bool:
        """A stop string is complete; the answer's text ends before it."""
        return self._stop.matched is not None

    def reason_to_end(self) -> str | None:
        """The finish reason that tokens and text so far give, or None."""
        return "stop" if self.stopped else self.request.end_by_tokens()

    def add(self, token_id: int) -> str:
        """The text that became certain with this token, already appended to the request."""
        return self._unpublished(self._read(token_id))

    def conclude(self, delta: Delta) -> None:
        """The request has ended and this is its last news: complete its text and say why it ended."""
        rest = self._stop.add(self._detokenizer.finish())
        delta.text += self._unpublished(rest + self._stop.finish())
        if self.stopped and self.request.finish_reason == "length":
            self.request.end("stop")  # what the last token made certain was a stop string
        delta.finish_reason = self.request.finish_reason

    def last_delta(self) -> Delta:
        """The last news of a request that ended without a token of this step."""
        delta = Delta(self.request.id, self.request.index, [], "")
        self.conclude(delta)
        return delta

    def _read(self, token_id: int) -> str:
        """An end token is no text, unless it came where it may not end the answer."""
        self._count += 1
        request = self.request
        early = self._count < request.sampling.min_tokens
        if not early and token_id in request.end_token_ids:
            return ""
        text = self._detokenizer.add((token_id,))
        # Before min_tokens a stop string is text like any other.
        return text if early else self._stop.add(text)

    def _unpublished(self, text: str) -> str:
        if self._owed or self._ahead:
            text, self._owed = self._owed + text, ""
            self._ahead, text = max(0, self._ahead - len(text)), text[self._ahead :]
        return text
