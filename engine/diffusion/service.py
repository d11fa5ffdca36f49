"""An image model behind the engine process: what to paint in messages, pictures in news."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from inferfleet.engine.diffusion.engine import DiffusionEngine
from inferfleet.engine.diffusion.loader import load_images
from inferfleet.engine.diffusion.output import ImageStepOutput
from inferfleet.engine.diffusion.params import ImageParams, LoraChoice
from inferfleet.engine.diffusion.pulse import listen
from inferfleet.engine.diffusion.spec import DiffusionSpec
from inferfleet.engine.errors import EngineError, InvalidRequest
from inferfleet.engine.progress import Progress
from inferfleet.engine.services import Service

FIELDS = frozenset(field.name for field in fields(ImageParams))


class ImageService(Service[DiffusionEngine]):
    """An image model; it lives in this process alone."""

    @classmethod
    def load(cls, spec: DiffusionSpec, progress: Progress, alive: Callable[[], None]) -> ImageService:
        loaded = load_images(spec, progress)
        listen(loaded.engine.pipeline, alive)
        return cls(loaded.engine, loaded.card)

    def add(self, message: Mapping[str, Any]) -> None:
        image = message.get("image")
        if not isinstance(image, Mapping):
            raise InvalidRequest("this is an image model: it paints and does not chat", param="messages")
        self.engine.add(message["id"], params_of(image), priority=message.get("priority", 0))

    def news(self, *errors: tuple[str, EngineError]) -> ImageStepOutput:
        return ImageStepOutput(errors=list(errors))


def params_of(image: Mapping[str, Any]) -> ImageParams:
    """The wire's fields; one that is null is as good as absent. InvalidRequest names what is no such field."""
    given = {name: value for name, value in image.items() if value is not None}
    if unknown := sorted(set(given) - FIELDS):
        raise InvalidRequest(f"{unknown[0]} is no parameter of a picture", param=unknown[0])
    for name in ("prompt", "seed"):
        if name not in given:
            raise InvalidRequest(f"{name} is missing", param=name)
    if "init_image" in given:
        given["init_image"] = _bytes(given["init_image"])
    if "loras" in given:
        given["loras"] = _loras(given["loras"])
    return ImageParams(**given)


def _bytes(text: Any) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (TypeError, ValueError, binascii.Error) as error:
        raise InvalidRequest(f"the init image is no base64: {error}", param="image") from error


def _loras(entries: Any) -> tuple[LoraChoice, ...]:
    try:
        return tuple(LoraChoice(**entry) for entry in entries)
    except TypeError as error:
        raise InvalidRequest("loras must be a list of {name, scale}", param="loras") from error
