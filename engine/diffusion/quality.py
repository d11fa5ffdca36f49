"""What quantising a FLUX transformer costs, measured: the same pictures painted with exact and with coded weights.

latent error   ||a - b|| / ||a|| of the finished latents
PSNR           10 log10(255^2 / mean squared difference of the 8-bit pictures), in dB; 100 for equal pictures

Prompts, seeds, size and steps are fixed, so that two reports can be compared. A picture differs by more than noise does
from one that is as good: a few percent in the weights move an outline or exchange a leaf. So these figures say how far
the pictures are from the model's own, not how they look.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from inferfleet.engine.errors import NumericalError

if TYPE_CHECKING:
    from inferfleet.engine.diffusion.pipeline import Pipeline

#: Changes whenever figures would: reports of another version are measured anew.
VERSION = 1
#: Short enough for any model's sequence.
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

    #: [tokens, channels] float32
    latents: Tensor
    #: [3, height, width] uint8
    picture: Tensor


@dataclass(frozen=True)
class Setup:
    """How the pictures are painted."""

    side: int
    steps: int
    guidance: float | None
    #: Tokens of the prompts, padding included.
    length: int

    @classmethod
    def of(cls, pipeline: Pipeline) -> Setup:
        side = min(pipeline.default_size, MAX_SIDE)
        steps, guidance = (GUIDED_STEPS, GUIDANCE) if pipeline.guided else (STEPS, None)
        return cls(side, steps, guidance, pipeline.max_sequence_length)


@torch.inference_mode()
def paint(pipeline: Pipeline, setup: Setup, prompts: Sequence[str] = PROMPTS) -> list[Painted]:
    """A picture a prompt, one after another. NumericalError where one has no finite numbers."""
    pipeline.loras.select([])
    return [_paint(pipeline, setup, prompt, SEED + index) for index, prompt in enumerate(prompts)]


def _paint(pipeline: Pipeline, setup: Setup, prompt: str, seed: int) -> Painted:
    device, dtype = pipeline.device, pipeline.dtype
    transformer: Any = pipeline.transformer
    words = pipeline.prompts.embed(prompt, setup.length)
    side = setup.side // pipeline.vae_scale
    noise = torch.randn(1, pipeline.latent_channels, side, side, generator=torch.Generator().manual_seed(seed))
    latents = packed(noise).to(device, dtype)
    rows = torch.arange(side // 2, dtype=torch.float32, device=device)
    places = torch.cartesian_prod(torch.zeros(1, device=device), rows, rows)
    sigmas = pipeline.schedule.sigmas(setup.steps, latents.shape[1])
    for now, then in zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True):
        flow = transformer(
            hidden_states=latents,
            timestep=torch.full((1,), now, device=device, dtype=dtype),
            guidance=None if setup.guidance is None else torch.full((1,), setup.guidance, device=device, dtype=dtype),
            pooled_projections=words.pooled[None],
            encoder_hidden_states=words.t5[None],
            txt_ids=torch.zeros(setup.length, 3, device=device, dtype=dtype),
            img_ids=places.to(dtype),
            return_dict=False,
        )[0]
        latents = (latents.float() + (then - now) * flow.float()).to(dtype)
    if not latents.isfinite().all():
        raise NumericalError(f"the picture of {prompt!r} has latents that are not finite")
    vae: Any = pipeline.vae
    scaled = unpacked(latents, side) / vae.config.scaling_factor + vae.config.shift_factor
    decoded = vae.decode(scaled.to(vae.dtype), return_dict=False)[0][0].float()
    if not decoded.isfinite().all():
        raise NumericalError(f"the picture of {prompt!r} has pixels that are not finite")
    picture = ((decoded / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    return Painted(latents[0].float().cpu(), picture.cpu())


def packed(latents: Tensor) -> Tensor:
    """[1, C, S, S] -> [1, S/2 * S/2, 4 C]: 2 x 2 latents are a token, channel by channel."""
    _, channels, side, _ = latents.shape
    parts = latents.view(1, channels, side // 2, 2, side // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return parts.reshape(1, (side // 2) ** 2, 4 * channels)


def unpacked(tokens: Tensor, side: int) -> Tensor:
    """The way back."""
    parts = tokens.view(1, side // 2, side // 2, -1, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return parts.reshape(1, -1, side, side)


def psnr(one: Tensor, other: Tensor) -> float:
    """Of two pictures of uint8, in dB."""
    error = float((one.double() - other.double()).square().mean())
    return min(MOST_PSNR, 10 * math.log10(255**2 / error)) if error else MOST_PSNR


def distances(full: Sequence[Painted], coded: Sequence[Painted]) -> dict[str, Any]:
    """The figures of a report."""
    errors = [float((a.latents - b.latents).norm() / a.latents.norm()) for a, b in zip(full, coded, strict=True)]
    decibels = [psnr(a.picture, b.picture) for a, b in zip(full, coded, strict=True)]
    return {
        "latent_error": {"mean": sum(errors) / len(errors), "max": max(errors)},
        "psnr": {"mean": sum(decibels) / len(decibels), "min": min(decibels), "unit": "dB"},
    }
