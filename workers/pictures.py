"""An image job between the outside and the engine: what the engine is asked for, and OpenAI's images response.

The answer names the pictures and holds none: they lie in the store.
"""

import base64
from collections.abc import Sequence
from typing import Any

from inferfleet.tasks.contracts import ImageEditRequest, ImageRequest, JobRequest
from inferfleet.tasks.contracts.contract import MAX_SEED
from inferfleet.tasks.contracts.images import MAX_PICTURES
from inferfleet.tasks.errors import EngineError
from inferfleet.tasks.records import Claim, Output
from inferfleet.workers.errand import Card, Errand
from inferfleet.workers.flight import seed_of
from inferfleet.workers.image_flight import ImageFlight
from inferfleet.workers.media import Media
from inferfleet.workers.outputs import OutputWriter


class ImageErrand(Errand):
    """Pictures of one prompt."""

    def __init__(
        self,
        claim: Claim,
        job: JobRequest,
        card: Card,
        body: ImageRequest,
        *,
        max_bytes: int,
        media: Media,
        writer: OutputWriter,
    ) -> None:
        """max_bytes: of all pictures together."""
        super().__init__(claim, job, card)
        self._init_image = body.init_image if isinstance(body, ImageEditRequest) else None
        self._painting = body.painting()
        self._sides = body.sides
        self._format = {
            "output_format": body.output_format or "png",
            "response_format": body.response_format or "url",
        }
        self._media = media
        self._writer = writer
        self._flight = ImageFlight(
            claim.job_id, claim.fence, body.model, num_pictures=body.n or 1, max_bytes=max_bytes, deliver=writer.deliver
        )

    @property
    def flight(self) -> ImageFlight:
        return self._flight

    @property
    def weight(self) -> int:
        return self._flight.num_pictures

    def request(self) -> dict[str, Any]:
        """Also raises EngineError, when an init image cannot be decoded for a reason of this machine's."""
        # The i-th picture is made from seed + i, which has to fit as well.
        wanted = {"seed": min(seed_of(self.claim.job_id), MAX_SEED - MAX_PICTURES), **self._painting}
        if self._init_image is not None:
            width, height = self._sides or (self.card["default_size"],) * 2
            picture = self._media.picture(self._init_image, width, height)
            self._init_image = None  # from here on the engine has it
            wanted |= {"width": width, "height": height, "init_image": base64.b64encode(picture).decode()}
        return {"priority": self.priority, "image": wanted}

    def usage(self) -> dict[str, Any]:
        """Tokens of the prompt, and latent tokens of the pictures."""
        usage = self._flight.usage or {}
        prompt, pictures = usage.get("input_tokens", 0), usage.get("output_tokens", 0)
        return {
            "input_tokens": prompt,
            "output_tokens": pictures,
            "total_tokens": prompt + pictures,
            "input_tokens_details": {"text_tokens": prompt, "image_tokens": 0},
        }

    def answer(self) -> dict[str, Any]:
        outputs = self._flight.outputs
        if [output["index"] for output in outputs] != list(range(self._flight.num_pictures)):
            raise EngineError(f"the engine made {len(outputs)} pictures of {self._flight.num_pictures}")
        return {
            "created": self.claim.created_ms // 1000,
            "data": [{"index": output["index"], "seed": output["seed"]} for output in outputs],
            "size": f"{outputs[0]['width']}x{outputs[0]['height']}",
            **self._format,
            "model": self._flight.model,
            "licence": self.card.get("licence"),
            "usage": self.usage(),
        }

    def outputs(self) -> Sequence[Output]:
        return self._flight.outputs

    def discard(self) -> None:
        self._writer.discard(self._flight)
