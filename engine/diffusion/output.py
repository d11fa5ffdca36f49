"""What the diffusion engine tells its caller after a step. Plain data; `to_dict` is its form on the wire."""

from __future__ import annotations

import base64
from dataclasses import dataclass, field
from typing import Any

from inferfleet.engine.errors import EngineError


@dataclass(frozen=True, slots=True)
class Progress:
    """Transformer steps done and to do, over all pictures of a request."""

    id: str
    step: int
    steps: int

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "progress", "id": self.id, "step": self.step, "steps": self.steps}


@dataclass(frozen=True, slots=True)
class Preview:
    """A small picture of how picture `index` stands after `step` of its steps."""

    id: str
    index: int
    step: int
    content_type: str
    data: bytes

    def to_dict(self) -> dict[str, Any]:
        return {
            "kind": "preview",
            "id": self.id,
            "index": self.index,
            "step": self.step,
            "content_type": self.content_type,
            "b64_json": base64.b64encode(self.data).decode(),
        }


@dataclass(frozen=True, slots=True)
class Picture:
    """A finished picture as the file that was asked for."""

    id: str
    index: int
    seed: int
    width: int
    height: int
    content_type: str
    data: bytes

    def to_dict(self) -> dict[str, Any]:
        return {
            "kind": "picture",
            "id": self.id,
            "index": self.index,
            "seed": self.seed,
            "width": self.width,
            "height": self.height,
            "content_type": self.content_type,
            "b64_json": base64.b64encode(self.data).decode(),
        }


@dataclass(frozen=True, slots=True)
class ImageUsage:
    """Tokens of the prompt, and latent tokens of the finished pictures."""

    input_tokens: int
    output_tokens: int

    def to_dict(self) -> dict[str, int]:
        return {"input_tokens": self.input_tokens, "output_tokens": self.output_tokens}


@dataclass(slots=True)
class ImageStepOutput:
    """One step's news; `finished` and `errors` name each id once, and never both."""

    deltas: list[Progress | Preview | Picture] = field(default_factory=list)
    finished: list[tuple[str, ImageUsage]] = field(default_factory=list)
    errors: list[tuple[str, EngineError]] = field(default_factory=list)
    #: Pictures that the step moved on.
    batch_size: int = 0

    def __bool__(self) -> bool:
        """True if there is something to tell."""
        return bool(self.deltas or self.finished or self.errors)

    @property
    def figures(self) -> dict[str, int]:
        """How much the step computed."""
        return {"batch_size": self.batch_size}

    def to_dict(self) -> dict[str, Any]:
        return {
            "deltas": [delta.to_dict() for delta in self.deltas],
            "finished": [{"id": id, "usage": usage.to_dict()} for id, usage in self.finished],
            "errors": [
                {"id": id, "code": error.code, "message": error.message, "param": error.param}
                for id, error in self.errors
            ],
        }
