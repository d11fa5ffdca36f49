"""What the diffusion engine tells its caller after a step. Plain data; `to_dict` is its form on the wire."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Any

from inferfleet.engine.news import News


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
class ImageStepOutput(News[Progress | Preview | Picture, ImageUsage]):
    """News of pictures."""

    #: Pictures that the step moved on.
    batch_size: int = 0

    @property
    def figures(self) -> dict[str, int]:
        return {"batch_size": self.batch_size}
