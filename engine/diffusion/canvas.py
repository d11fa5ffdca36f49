"""Pictures in the making: their latents, and one step of the transformer for several of them.

Shapes: B pictures, T latent tokens of 4 C numbers, L tokens of text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from inferfleet.engine.diffusion.decoder import Decoder
from inferfleet.engine.diffusion.latents import draw, generator, image_ids, pack, text_ids, unpack
from inferfleet.engine.diffusion.limits import Wanted
from inferfleet.engine.diffusion.pipeline import Pipeline
from inferfleet.engine.diffusion.previews import guess
from inferfleet.engine.diffusion.prompts import Embeddings
from inferfleet.engine.diffusion.turns import Group, Row


@dataclass(slots=True, eq=False)
class Canvas:
    """One picture: where it stands and what moves it."""

    row: Row
    wanted: Wanted
    embeddings: Embeddings
    #: [T, 4 C], on the device in the pipeline's format.
    latents: Tensor
    #: Noise levels of the steps that it takes, and the 0 after the last one: float32 on the CPU.
    sigmas: Tensor
    #: [T, 4 C] float32, the guess of the finished picture, where a preview is due.
    guess: Tensor | None = None

    @property
    def seed(self) -> int:
        return self.wanted.seed + self.row.index

    @property
    def preview_due(self) -> bool:
        """Whether after the next step a preview is wanted; not after the last one, which the picture itself follows."""
        every, done = self.wanted.preview_every, self.row.num_done + 1
        return every is not None and done % every == 0 and done < self.row.num_steps

    def grid(self, latents: Tensor) -> Tensor:
        """[T, 4 C] -> [1, C, h, w]"""
        return unpack(latents[None], self.row.group.height, self.row.group.width)


def begin(
    row: Row, wanted: Wanted, embeddings: Embeddings, moments: Tensor | None, pipeline: Pipeline, decoder: Decoder
) -> Canvas:
    """A picture before its first step: noise, or with moments (of an encoded init image) that image under noise."""
    group = row.group
    random = generator(wanted.seed + row.index)
    sigmas = pipeline.schedule.sigmas(wanted.num_inference_steps, group.height * group.width // 4)
    sigmas = sigmas[wanted.first_step :]
    shape = (1, pipeline.latent_channels, group.height, group.width)
    # diffusers draws for the image first, then the noise; a seed shall mean the same here.
    image = None if moments is None else decoder.sample(moments, random).to(pipeline.dtype)
    latents = draw(random, shape, pipeline.dtype).to(pipeline.device)
    if image is not None:
        sigma = sigmas[0].to(image.device, image.dtype)
        latents = sigma * latents + (1 - sigma) * image
    return Canvas(row, wanted, embeddings, pack(latents)[0], sigmas)


@torch.no_grad()
def move(canvases: Sequence[Canvas], pipeline: Pipeline) -> list[bool]:
    """One Euler step of pictures of one group, each at its own noise level. False where the result is not finite.

    Nothing is changed if it raises.
    """
    group = canvases[0].row.group
    x = torch.stack([canvas.latents for canvas in canvases])
    now, then = _levels(canvases, pipeline.device)
    velocity = _velocity(canvases, x, now, group, pipeline)
    moved = (x.float() + (then - now)[:, None, None] * velocity.float()).to(pipeline.dtype)
    finite = moved.isfinite().flatten(1).all(1).tolist()
    for number, canvas in enumerate(canvases):
        canvas.guess = guess(x[number], velocity[number], float(now[number])) if canvas.preview_due else None
        # A copy of its own: a view would keep the whole batch in memory for as long as one of its pictures lives.
        canvas.latents = moved[number].clone()
    return finite


def _levels(canvases: Sequence[Canvas], device: torch.device) -> tuple[Tensor, Tensor]:
    """[B] float32 each: the noise level that each picture has, and the one after this step."""
    pairs = torch.stack([canvas.sigmas[canvas.row.num_done : canvas.row.num_done + 2] for canvas in canvases])
    now, then = pairs.to(device).unbind(1)
    return now, then


def _velocity(canvases: Sequence[Canvas], x: Tensor, sigma: Tensor, group: Group, pipeline: Pipeline) -> Tensor:
    """[B, T, 4 C]"""
    guidance = None
    if pipeline.guided:
        scales = [canvas.wanted.guidance_scale for canvas in canvases]
        guidance = torch.tensor(scales, dtype=torch.float32, device=pipeline.device)
    pipeline.loras.select([canvas.wanted.loras for canvas in canvases])
    transformer: Any = pipeline.transformer
    velocity: Tensor = transformer(
        hidden_states=x,
        # A level passes through the pipeline's format as 0 to 1000, as in diffusers.
        timestep=(sigma * 1000).to(pipeline.dtype) / 1000,
        guidance=guidance,
        pooled_projections=torch.stack([canvas.embeddings.pooled for canvas in canvases]),
        encoder_hidden_states=torch.stack([canvas.embeddings.t5 for canvas in canvases]),
        txt_ids=text_ids(group.length, pipeline.device),
        img_ids=image_ids(group.height, group.width, pipeline.device),
        return_dict=False,
    )[0]
    return velocity
