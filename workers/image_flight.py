"""An image job on its way through an engine: how far it is, and its pictures, which go into the store as they come.

A new attempt starts over: the seed is the same, so its pictures are too, and only those of the attempt that ends the
job are ever seen.
"""

import base64
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from inferfleet.tasks import errors, names
from inferfleet.tasks.records import Output
from inferfleet.workers import logs
from inferfleet.workers.flight import Ending, Event, Flight

log = logs.get("image")

#: Of all previews that one run publishes, in base64. The job's event log is kept whole, so it must not grow for ever.
MAX_PREVIEW_CHARS = 16 << 20


@dataclass(frozen=True)
class PictureFile:
    """A finished picture on its way to the store."""

    index: int
    seed: int
    width: int
    height: int
    content_type: str
    data: bytes


#: Takes a picture and returns at once; says `stored` to its flight when it is in the store.
Deliver = Callable[["ImageFlight", PictureFile], None]


class ImageFlight(Flight):
    """An image job between claim and end."""

    def __init__(
        self, job_id: str, fence: int, model: str, *, num_pictures: int, max_bytes: int, deliver: Deliver
    ) -> None:
        """max_bytes: of all its pictures together."""
        super().__init__(job_id, fence, model)
        self.num_pictures = num_pictures
        self._max_bytes = max_bytes
        self._deliver = deliver
        self._outputs: dict[int, Output] = {}
        self._seen: set[int] = set()
        self._num_bytes = 0
        self._preview_chars = 0
        self._num_steps = 0

    @property
    def num_pictures_made(self) -> int:
        return len(self._outputs)

    @property
    def num_steps(self) -> int:
        return self._num_steps

    @property
    def num_prompt_tokens(self) -> int:
        return (self.usage or {}).get("input_tokens", 0)

    @property
    def outputs(self) -> list[Output]:
        """What is in the store, in order."""
        with self._lock:
            return [output for _, output in sorted(self._outputs.items())]

    @property
    def keys(self) -> list[str]:
        """Of the pictures that are in the store."""
        return [output["id"] for output in self.outputs]

    def _is_settled(self) -> bool:
        """Also, every picture is in the store; a cancelled job waits for none."""
        return super()._is_settled() and (self.cancelled or len(self._outputs) == len(self._seen))

    def absorb(self, delta: Mapping[str, Any]) -> bool:
        """A delta of progress, a preview or a picture. Of progress and previews only the latest of a flush is told."""
        with self._lock:
            first = self._is_first()
            if delta["kind"] == "progress":
                self._num_steps = delta["step"]
                self._replace({"type": names.PROGRESS, "step": delta["step"], "steps": delta["steps"]})
            elif delta["kind"] == "preview":
                self._preview(delta)
            elif delta["index"] not in self._seen:
                self._take(delta)
        if self._num_bytes > self._max_bytes:
            text = f"the pictures of one job may have {self._max_bytes} bytes in all (max_result_bytes)"
            self.end(Ending.FAILED, errors.ResultTooLarge(text).to_dict())
        return first

    def stored(self, picture: PictureFile) -> bool:
        """A picture is in the store; False where nobody waits for it any more."""
        output: Output = {
            "id": names.output_id(self.job_id, self.fence, picture.index),
            "index": picture.index,
            "content_type": picture.content_type,
            "size_bytes": len(picture.data),
            "hash": f"sha256:{hashlib.sha256(picture.data).hexdigest()}",
            "width": picture.width,
            "height": picture.height,
            "seed": picture.seed,
        }
        with self._lock:
            if self.ending is not None:
                return False
            self._outputs[picture.index] = output
            self._pending.append({"type": names.OUTPUT, **output})
            return True

    def _take(self, delta: Mapping[str, Any]) -> None:
        data = base64.b64decode(delta["b64_json"])
        self._seen.add(delta["index"])
        self._num_bytes += len(data)
        if self._num_bytes <= self._max_bytes:
            size = delta["width"], delta["height"]
            self._deliver(self, PictureFile(delta["index"], delta["seed"], *size, delta["content_type"], data))

    def _preview(self, delta: Mapping[str, Any]) -> None:
        before, self._preview_chars = self._preview_chars, self._preview_chars + len(delta["b64_json"])
        if self._preview_chars <= MAX_PREVIEW_CHARS:
            told = {name: delta[name] for name in ("index", "step", "content_type", "b64_json")}
            self._replace({"type": names.PREVIEW, **told})
        elif before <= MAX_PREVIEW_CHARS:
            log.warning("previews_end", job_id=self.job_id, limit_chars=MAX_PREVIEW_CHARS)

    def _replace(self, event: Event) -> None:
        """In the place of a pending event of the same type and picture."""
        same = event["type"], event.get("index")
        self._pending = [earlier for earlier in self._pending if (earlier["type"], earlier.get("index")) != same]
        self._pending.append(event)
