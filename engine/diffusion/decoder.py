"""Between pixels and latents: the VAE, one picture at a time, so that no picture depends on the ones beside it.

Large pictures go through it in overlapping tiles whose seams are blended: what it needs grows with pixels, and beyond a
point no device has that. A decoded picture that is not finite, or of one colour to the last digit, is decoded once more
in float32, which half precision's overflows do not reach; if that does not help, NumericalError says so.

Latents that are not finite themselves are not tried again: the transformer's weights are here in one number format
only, so a second run from the seed would end the same way.

Shapes: C latent channels, h x w latents, H x W pixels.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from inferfleet.engine.diffusion.latents import draw
from inferfleet.engine.diffusion.pictures import to_pixels
from inferfleet.engine.errors import NumericalError

log = logging.getLogger(__name__)

#: Pixels of a tile's side at most: what FLUX's VAE was trained for.
TILE = 1024
#: The share of a tile that overlaps its neighbour's.
OVERLAP = 0.25
#: Below this distance of the largest from the smallest number of a picture, in pixels' digits before they are cut to
#: 0..255, it is of one colour. A picture that a model means to be white still differs by more.
FLAT = 0.01


class Decoder:
    """A VAE with its scale and its limit of memory."""

    def __init__(self, vae: Any, *, vae_scale: int, tiling_pixels: int) -> None:
        """vae: diffusers' AutoencoderKL."""
        self.vae, self.vae_scale, self.tiling_pixels = vae, vae_scale, tiling_pixels
        self.num_retries = 0
        self._shift = vae.config.shift_factor or 0.0
        self._scaling = vae.config.scaling_factor

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.vae.dtype
        return dtype

    def paint(self, latents: Tensor) -> Tensor:
        """[1, C, h, w] -> uint8 [H, W, 3] on the CPU. NumericalError for latents that make no picture."""
        if not latents.isfinite().all():
            raise NumericalError("the picture's latents are not finite")
        decoded = self.decode(latents)
        if (fault := _fault(decoded)) and self.dtype != torch.float32:
            log.warning("a picture is decoded again in float32", extra={"fields": {"because": fault}})
            self.num_retries += 1
            with self._in_float32():
                decoded = self.decode(latents)
            fault = _fault(decoded)
        if fault:
            raise NumericalError(f"the decoded picture {fault}")
        return to_pixels(decoded[0])

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """[1, C, h, w] -> [1, 3, H, W] around -1 to 1."""
        scaled = (latents.to(self.dtype) / self._scaling) + self._shift
        return self._tiled(lambda part: self.vae.decode(part, return_dict=False)[0], scaled, 1, self.vae_scale)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """uint8 [H, W, 3] -> [1, 2 C, h, w]: mean and log variance of latents, see `sample`."""
        unit = (pixels.permute(2, 0, 1)[None].float() / 255) * 2 - 1
        image = unit.to(self.vae.device, self.dtype)
        return self._tiled(lambda part: self.vae.encode(part).latent_dist.parameters, image, self.vae_scale, 1)

    def sample(self, moments: Tensor, random: torch.Generator) -> Tensor:
        """Latents [1, C, h, w] of an encoded picture, drawn as diffusers draws them."""
        mean, variance = moments.chunk(2, dim=1)
        # The log variance within -30 to 20, as diffusers' DiagonalGaussianDistribution has it.
        deviation = torch.exp(0.5 * variance.clamp(-30, 20))
        drawn = draw(random, tuple(mean.shape), mean.dtype).to(mean.device)
        return (mean + deviation * drawn - self._shift) * self._scaling

    def _tiled(self, function: Callable[[Tensor], Tensor], x: Tensor, scale_in: int, scale_out: int) -> Tensor:
        """function of x, in tiles if x is large. x: [1, _, scale_in * h, scale_in * w], its result scale_out * h ..."""
        height, width = x.shape[-2] // scale_in, x.shape[-1] // scale_in
        if height * width * self.vae_scale**2 <= self.tiling_pixels:
            return function(x)
        side = max(2, min(TILE, math.isqrt(self.tiling_pixels)) // self.vae_scale)
        total = norm = None
        for rows, down in _tiles(height, side):
            for columns, across in _tiles(width, side):
                part = function(x[..., _scaled(rows, scale_in), _scaled(columns, scale_in)])
                if total is None or norm is None:
                    shape = (1, part.shape[1], height * scale_out, width * scale_out)
                    total, norm = x.new_zeros(shape, dtype=torch.float32), x.new_zeros(shape[-2:], dtype=torch.float32)
                weights = torch.outer(_ramp(rows, *down, scale_out), _ramp(columns, *across, scale_out)).to(x.device)
                total[..., _scaled(rows, scale_out), _scaled(columns, scale_out)] += part * weights
                norm[_scaled(rows, scale_out), _scaled(columns, scale_out)] += weights
        assert total is not None and norm is not None, "there is at least one tile"
        return (total / norm).to(x.dtype)

    @contextmanager
    def _in_float32(self) -> Iterator[None]:
        """The VAE's weights in float32 for once: every half-precision number is one of float32's, so all come back."""
        before = self.dtype
        nn.Module.to(self.vae, dtype=torch.float32)
        try:
            yield
        finally:
            nn.Module.to(self.vae, dtype=before)


def _tiles(size: int, side: int) -> Iterator[tuple[slice, tuple[int, int]]]:
    """Tiles of at most `side` over `size` latents, evenly, and how far each overlaps the one before and after."""
    overlap = max(1, int(side * OVERLAP))
    count = 1 if size <= side else math.ceil((size - overlap) / (side - overlap))
    starts = [round(number * (size - side) / (count - 1)) for number in range(count)] if count > 1 else [0]
    for number, start in enumerate(starts):
        before = starts[number - 1] + side - start if number else 0
        after = start + side - starts[number + 1] if number + 1 < count else 0
        yield slice(start, min(size, start + side)), (before, after)


def _ramp(place: slice, before: int, after: int, scale: int) -> Tensor:
    """How much a tile counts along one side: rises over what overlaps the tile before it, falls over the next one's."""
    positions = torch.arange((place.stop - place.start) * scale) + 0.5
    weights = torch.ones_like(positions)
    if before:
        weights = weights.minimum(positions / (before * scale))
    if after:
        weights = weights.minimum(positions.flip(0) / (after * scale))
    return weights


def _scaled(place: slice, scale: int) -> slice:
    return slice(place.start * scale, place.stop * scale)


def _fault(decoded: Tensor) -> str | None:
    """Why this is no picture; None if it is one."""
    if not decoded.isfinite().all():
        return "is not finite"
    low, high = decoded.amin(dim=(-2, -1)), decoded.amax(dim=(-2, -1))
    return "has one colour only" if bool(((high - low) * 127.5 < FLAT).all()) else None
