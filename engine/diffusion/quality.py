"""What quantising a FLUX transformer costs, measured: the same pictures painted with exact and with coded weights.

latent error   ||a - b|| / ||a|| of the finished latents
PSNR           10 log10(255^2 / mean squared difference of the 8-bit pictures), in dB; 100 for equal pictures

Prompts, seeds, size and steps are fixed, so that two reports can be compared. A picture differs by more than noise does
from one that is as good: a few percent in the weights move an outline or exchange a leaf. So these figures say how far
the pictures are from the model's own, not how they look. The usual threshold, 25 dB, is a root mean square difference
of 14 of 255 levels: about where other shapes, not only other grain, begin to account for it. It is a judgement.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from inferfleet.engine.diffusion.engine import DiffusionEngine
from inferfleet.engine.diffusion.output import Picture
from inferfleet.engine.diffusion.params import ImageParams
from inferfleet.engine.diffusion.pipeline import Pipeline
from inferfleet.engine.diffusion.spec import DiffusionSpec

#: Changes whenever figures would: reports of another version are measured anew.
VERSION = 1
#: Cut by words where a model's sequence is shorter.
PROMPTS = (
    "a red circle on a blue background",
    "a lighthouse on a cliff at dusk, oil painting",
    "portrait of an old sailor with a grey beard",
    "a bowl of lemons on a wooden table, soft light",
    "a tabby cat asleep on a green sofa",
    "a busy street in the rain, neon signs",
    "an astronaut riding a white horse",
    "a close-up of a dandelion, blurred meadow",
)
#: Of the picture with the first prompt; each has the next.
SEED = 20_260
#: Largest side in pixels; a smaller model's own size is taken.
MAX_SIDE = 512
#: Models that read a guidance value are made for more steps than those that do not.
STEPS, GUIDED_STEPS, GUIDANCE = 4, 8, 3.5
#: Of pictures that are equal.
MOST_PSNR = 100.0


@dataclass(frozen=True)
class Painted:
    """One picture."""

    #: [1, C, h, w] float32
    latents: Tensor
    #: [height, width, 3] uint8
    pixels: Tensor


@dataclass(frozen=True)
class Setup:
    """How the pictures are painted."""

    side: int
    steps: int
    guidance: float | None

    @classmethod
    def of(cls, pipeline: Pipeline) -> Setup:
        steps, guidance = (GUIDED_STEPS, GUIDANCE) if pipeline.guided else (STEPS, None)
        return cls(min(pipeline.default_size, MAX_SIDE), steps, guidance)


def paint(pipeline: Pipeline, spec: DiffusionSpec, prompts: Sequence[str] | None = None) -> list[Painted]:
    """A picture a prompt, by the engine that serves them. EngineError where one fails.

    prompts: those that come along if None.
    """
    setup = Setup.of(pipeline)
    if prompts is None:
        prompts = [_fitted(prompt, pipeline) for prompt in PROMPTS]
    engine = DiffusionEngine(pipeline, replace(spec, max_pixels=max(spec.max_pixels, setup.side**2)))
    latents: dict[str, Tensor] = {}
    pixels: dict[str, Tensor] = {}
    engine.on_latents = lambda name, _, value: latents.update({name: value.float().cpu()})
    for number, prompt in enumerate(prompts):
        engine.add(str(number), _params(prompt, SEED + number, setup))
    while engine.has_work:
        out = engine.step()
        for _, error in out.errors:
            raise error
        pixels |= {delta.id: _pixels(delta) for delta in out.deltas if isinstance(delta, Picture)}
    return [Painted(latents[name], pixels[name]) for name in map(str, range(len(prompts)))]


def _fitted(prompt: str, pipeline: Pipeline) -> str:
    words = prompt.split()
    while len(words) > 1 and pipeline.prompts.count(" ".join(words)) > pipeline.max_sequence_length:
        words.pop()
    return " ".join(words)


def _params(prompt: str, seed: int, setup: Setup) -> ImageParams:
    return ImageParams(
        prompt=prompt,
        seed=seed,
        width=setup.side,
        height=setup.side,
        num_inference_steps=setup.steps,
        guidance_scale=setup.guidance,
    )


def _pixels(picture: Picture) -> Tensor:
    with Image.open(io.BytesIO(picture.data)) as image:
        width, height = image.size
        return torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8).view(height, width, 3)


def psnr(one: Tensor, other: Tensor) -> float:
    """Of two pictures of uint8, in dB."""
    error = float((one.double() - other.double()).square().mean())
    return min(MOST_PSNR, 10 * math.log10(255**2 / error)) if error else MOST_PSNR


def distances(full: Sequence[Painted], coded: Sequence[Painted]) -> dict[str, Any]:
    """The figures of a report."""
    errors = [float((a.latents - b.latents).norm() / a.latents.norm()) for a, b in zip(full, coded, strict=True)]
    decibels = [psnr(a.pixels, b.pixels) for a, b in zip(full, coded, strict=True)]
    return {
        "latent_error": {"mean": sum(errors) / len(errors), "max": max(errors)},
        "psnr": {"mean": sum(decibels) / len(decibels), "min": min(decibels), "unit": "dB"},
    }
