"""Pictures as files: PNG, JPEG or WebP with where they come from inside, and PNG files as pixels.

PNG has its facts as text chunks, JPEG and WebP as EXIF (the facts as JSON in ImageDescription). The prompt's text is
among them only where it was asked for.
"""

from __future__ import annotations

import hashlib
import io
import json
import warnings
from collections.abc import Mapping

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from inferfleet.engine.diffusion.limits import Wanted
from inferfleet.engine.diffusion.params import OutputFormat
from inferfleet.engine.errors import InvalidRequest

CONTENT_TYPES: dict[OutputFormat, str] = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
SOFTWARE = "inferfleet"
#: Where nobody says: hardly seen, and a fifth of the bytes of a PNG.
DEFAULT_QUALITY = 90
#: Numbers of EXIF's tags.
EXIF_SOFTWARE, EXIF_DESCRIPTION = 0x0131, 0x010E


def to_pixels(decoded: Tensor) -> Tensor:
    """[3, H, W] around -1 to 1 -> uint8 [H, W, 3] on the CPU."""
    unit = (decoded.float() / 2 + 0.5).clamp(0, 1)
    return (unit * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().cpu()


def facts(wanted: Wanted, index: int, *, model: str, commit: str | None, licence: str) -> dict[str, str]:
    """What a picture's file says about it, all as text."""
    found = {
        "Software": SOFTWARE,
        "model": model,
        "revision": commit or "",
        "licence": licence,
        "prompt_sha256": hashlib.sha256(wanted.prompt.encode()).hexdigest(),
        "prompt": wanted.prompt if wanted.embed_prompt else "",
        "seed": str(wanted.seed + index),
        "steps": str(wanted.num_inference_steps),
        "guidance": "" if wanted.guidance_scale is None else f"{wanted.guidance_scale:g}",
        "strength": "" if wanted.strength is None else f"{wanted.strength:g}",
        "loras": ", ".join(f"{choice.name}:{choice.scale:g}" for choice in wanted.loras),
        "size": f"{wanted.width}x{wanted.height}",
    }
    return {name: value for name, value in found.items() if value}


def to_file(pixels: Tensor, form: OutputFormat, quality: int | None, facts: Mapping[str, str]) -> bytes:
    """uint8 [H, W, 3] -> the file. quality: 0 to 100 of jpeg and webp; None = 90."""
    image = Image.fromarray(pixels.numpy())
    buffer = io.BytesIO()
    if form == "png":
        info = PngInfo()
        for name, value in facts.items():
            add = info.add_text if value.isascii() else info.add_itxt
            add(name, value)
        image.save(buffer, "PNG", pnginfo=info)
    else:
        exif = Image.Exif()
        exif[EXIF_SOFTWARE] = SOFTWARE
        exif[EXIF_DESCRIPTION] = json.dumps(dict(facts))
        image.save(buffer, form.upper(), quality=DEFAULT_QUALITY if quality is None else quality, exif=exif)
    return buffer.getvalue()


def read_init_image(data: bytes, width: int, height: int) -> Tensor:
    """A PNG of exactly that size -> uint8 [H, W, 3]. InvalidRequest for anything else; no more pixels are decoded."""
    try:
        with warnings.catch_warnings(), Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # its size is compared before it is decoded
            if image.size != (width, height):
                raise InvalidRequest(
                    f"the init image is {image.width} x {image.height}, the picture {width} x {height}", param="image"
                )
            pixels = image.convert("RGB").tobytes()
    except InvalidRequest:
        raise
    except Exception as error:  # Pillow's plug-ins raise many kinds for damaged files
        raise InvalidRequest(f"the init image is no PNG that can be read: {error}", param="image") from error
    return torch.frombuffer(bytearray(pixels), dtype=torch.uint8).view(height, width, 3)
