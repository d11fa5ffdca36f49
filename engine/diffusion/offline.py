"""Pictures without the fleet, for scripts, evaluation and tests.

painter = ImageGenerator("path/or/hub-id")
painter.generate("a red circle", width=512, height=512, seed=7).save("circle.png")
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image, ImageOps
from torch import Tensor

from inferfleet.engine.diffusion.loader import load_images
from inferfleet.engine.diffusion.output import ImageStepOutput, Picture
from inferfleet.engine.diffusion.params import ImageParams, LoraChoice
from inferfleet.engine.diffusion.spec import DiffusionSpec
from inferfleet.engine.errors import InvalidRequest


class ImageGenerator:
    """A loaded image model that paints many prompts together.

    Settings are those of DiffusionSpec (device, dtype, quantization, max_batch_size, encoders, loras, accept_licence,
    ...). Raises LoadError or a ModelError.
    """

    def __init__(self, path: str, **settings: Any) -> None:
        spec = DiffusionSpec.from_dict({"path": str(path), **settings})
        loaded = load_images(spec)
        self.engine, self.card = loaded.engine, loaded.card
        self._num_requests = 0

    def generate(self, prompt: str | Sequence[str], *, n: int = 1, **how: Any) -> Image.Image | list[Image.Image]:
        """One picture, or a list of n for each prompt in their order where there are several.

        how: width, height, num_inference_steps, guidance_scale, seed, max_sequence_length, strength, init_image (a
        PIL image, scaled and cut to the picture's size), loras (name -> scale), and the rest of ImageParams. Prompt
        number k of a list is painted from seed + k * n. Raises InvalidRequest before anything is painted, or
        NumericalError.
        """
        pictures, _ = self._run(prompt, n, how)
        images = [_opened(picture.data) for picture in pictures]
        return images[0] if isinstance(prompt, str) and n == 1 else images

    def latents(self, prompt: str | Sequence[str], *, n: int = 1, **how: Any) -> list[Tensor]:
        """As `generate`, but what goes into the VAE: [1, C, h, w] each."""
        return self._run(prompt, n, how)[1]

    def _run(self, prompt: str | Sequence[str], n: int, how: Mapping[str, Any]) -> tuple[list[Picture], list[Tensor]]:
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        names = [f"offline-{self._num_requests + number}" for number in range(len(prompts))]
        self._num_requests += len(prompts)
        places = {(name, index): number * n + index for number, name in enumerate(names) for index in range(n)}
        pictures: dict[int, Picture] = {}
        latents: dict[int, Tensor] = {}
        self.engine.on_latents = lambda name, index, value: latents.update({places[name, index]: value})
        try:
            for number, (name, text) in enumerate(zip(names, prompts, strict=True)):
                self.engine.add(name, self._params(text, n, number, dict(how)))
            while self.engine.has_work:
                _collect(pictures, places, self.engine.step())
        finally:
            self.engine.on_latents = None
            for name in names:
                self.engine.cancel(name)
            self.engine.step()
        return [pictures[place] for place in sorted(places.values())], [latents[at] for at in sorted(latents)]

    def _params(self, prompt: str, n: int, number: int, how: dict[str, Any]) -> ImageParams:
        seed = how.pop("seed", 0)
        image = how.pop("init_image", None)
        if image is not None:
            size = (how.get("width"), how.get("height"))
            side = self.engine.limits.default_size
            how["init_image"] = _as_png(image, (size[0] or side, size[1] or side))
        loras = tuple(LoraChoice(name=name, scale=scale) for name, scale in dict(how.pop("loras", {})).items())
        try:
            return ImageParams(prompt=prompt, n=n, seed=seed + number * n, loras=loras, **how)
        except TypeError as error:
            raise InvalidRequest(f"an unknown field: {error}") from error


def _collect(pictures: dict[int, Picture], places: Mapping[tuple[str, int], int], out: ImageStepOutput) -> None:
    for _, error in out.errors:
        raise error
    for delta in out.deltas:
        if isinstance(delta, Picture):
            pictures[places[delta.id, delta.index]] = delta


def _as_png(image: Image.Image, size: tuple[int, int]) -> bytes:
    """Scaled so that it covers the size, its middle cut out."""
    buffer = io.BytesIO()
    ImageOps.fit(image.convert("RGB"), size, Image.Resampling.LANCZOS).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _opened(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image
