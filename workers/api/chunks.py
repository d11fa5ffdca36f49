"""Turns a job's events into the chunks of an OpenAI chat stream. Pure: no Redis, no HTTP."""

from collections.abc import Iterator
from typing import Any

from inferfleet.workers.requests import completion_id


class ChunkWriter:
    """The chunks of one streamed completion, in order: a role a choice, deltas, a finish a choice, the usage."""

    def __init__(self, job_id: str, model: str, created: int, *, num_choices: int, include_usage: bool) -> None:
        self._base = {
            "id": completion_id(job_id),
            "object": "chat.completion.chunk",
            "created": created,
            "model": model,
        }
        self._num_choices = num_choices
        self._include_usage = include_usage
        self._finished: set[int] = set()

    def opening(self) -> Iterator[dict[str, Any]]:
        """One chunk a choice that names the role, as OpenAI sends before any text."""
        for index in range(self._num_choices):
            yield self._chunk(index, {"role": "assistant", "content": ""})

    def delta(self, event: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The chunks of one delta event; none when it shows nothing (half a code point, held-back text)."""
        index, text, logprobs = event["index"], event["delta"], event.get("logprobs")
        if text or logprobs:
            yield self._chunk(index, {"content": text}, logprobs=logprobs)
        if event.get("finish_reason") in ("stop", "length"):
            yield from self._finish(index, event["finish_reason"])

    def closing(self, completion: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """What is left at the end: a finish for each choice that had none, then the usage if asked for."""
        for choice in completion["choices"]:
            yield from self._finish(choice["index"], choice["finish_reason"])
        if self._include_usage:
            yield {**self._base, "choices": [], "usage": completion["usage"]}

    def _finish(self, index: int, reason: str) -> Iterator[dict[str, Any]]:
        if index not in self._finished:
            self._finished.add(index)
            yield self._chunk(index, {}, finish_reason=reason)

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        *,
        logprobs: list[dict[str, Any]] | None = None,
        finish_reason: str | None = None,
    ) -> dict[str, Any]:
        choice = {
            "index": index,
            "delta": delta,
            "logprobs": {"content": logprobs, "refusal": None} if logprobs else None,
            "finish_reason": finish_reason,
        }
        usage = {"usage": None} if self._include_usage else {}
        return {**self._base, "choices": [choice], **usage}
