"""How a picture stands, as a picture of a few hundred bytes: what it would be if the rest of its noise left at once.

A flow moves x from noise to picture along v, so x - sigma * v is the guess of step sigma. Its latents are averaged
down to the size of a stamp and go through the VAE like any picture: a few milliseconds where a step takes hundreds.
"""

from __future__ import annotations

import io

import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from inferfleet.engine.diffusion.decoder import Decoder
from inferfleet.engine.diffusion.pictures import to_pixels

#: Pixels of the longer side at most.
SIDE = 64
CONTENT_TYPE = "image/webp"
QUALITY = 80


def preview(latents: Tensor, decoder: Decoder) -> bytes | None:
    """[1, C, h, w], the guess of the finished latents -> a WebP file; None if they are not finite."""
    height, width = latents.shape[-2:]
    most = max(1, SIDE // decoder.vae_scale)
    shrink = max(1.0, max(height, width) / most)
    size = (max(1, round(height / shrink)), max(1, round(width / shrink)))
    small = F.adaptive_avg_pool2d(latents.float(), size).to(decoder.dtype)
    decoded = decoder.decode(small)
    if not decoded.isfinite().all():
        return None
    buffer = io.BytesIO()
    Image.fromarray(to_pixels(decoded[0]).numpy()).save(buffer, "WEBP", quality=QUALITY)
    return buffer.getvalue()


def guess(latents: Tensor, velocity: Tensor, sigma: float) -> Tensor:
    """What the picture will be, as far as one step of noise level sigma can tell. Any shape."""
    return latents.float() - sigma * velocity.float()
