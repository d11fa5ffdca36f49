"""Reads one picture and paints it at a size, in a process of its own: `python -m inferfleet.workers.decode_image W H`.

The file comes on stdin, a PNG of W x H pixels in RGB goes to stdout. Whatever a file does to its decoder, it does it
here, under limits of memory and time. Turned as its EXIF says; transparency becomes white; 16 bits become 8; CMYK by
the plain formula (colour profiles are not read); scaled to cover W x H and cut at the centre.

Exit status 0, or 3 with the reason on stderr when the picture is at fault; anything else is a fault of this machine,
except death by a signal, which the limits bring.
"""

import io
import os
import resource
import sys

from PIL import Image, ImageOps

from inferfleet.tasks.contracts.images import MAX_INIT_PIXELS
from inferfleet.workers.media import CPU_SECONDS, MEBIBYTES, REFUSED

FORMATS = ("PNG", "JPEG", "WEBP")
#: Those who chat on this machine's processors go first.
NICENESS = 5


class Refused(Exception):
    """The picture is at fault."""


def main() -> int:
    width, height = int(sys.argv[1]), int(sys.argv[2])
    os.nice(NICENESS)
    resource.setrlimit(resource.RLIMIT_AS, (MEBIBYTES << 20, MEBIBYTES << 20))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    Image.MAX_IMAGE_PIXELS = MAX_INIT_PIXELS
    try:
        painted = paint(sys.stdin.buffer.read(), width, height)
    except Refused as refusal:
        print(refusal, file=sys.stderr)
        return REFUSED
    except MemoryError:
        print("it needs too much memory", file=sys.stderr)
        return REFUSED
    sys.stdout.buffer.write(painted)
    return 0


def paint(data: bytes, width: int, height: int) -> bytes:
    """A file -> a PNG of the size. Raises Refused."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
            if getattr(picture, "is_animated", False):
                raise Refused("it is animated")
            picture.load()
            upright = ImageOps.exif_transpose(picture)
    except Refused:
        raise
    except MemoryError:
        raise
    except Exception as error:  # decoders raise whatever the bytes make them stumble over
        raise Refused("it is damaged and cannot be decoded") from error
    return encoded(covered(flattened(upright), width, height))


def flattened(picture: Image.Image) -> Image.Image:
    """RGB, 8 bits, opaque."""
    if picture.mode.startswith(("I", "F")):  # 16 bits a pixel, in whatever width it is held
        picture = picture.convert("I").point(lambda value: value * (1 / 256)).convert("L")
    if picture.has_transparency_data:
        layer = picture.convert("RGBA")
        ground = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(ground, layer).convert("RGB")
    return picture.convert("RGB")


def covered(picture: Image.Image, width: int, height: int) -> Image.Image:
    """The largest centred part of the right shape, scaled."""
    scale = max(width / picture.width, height / picture.height)
    part_width, part_height = width / scale, height / scale
    left, top = (picture.width - part_width) / 2, (picture.height - part_height) / 2
    box = (max(0.0, left), max(0.0, top), min(picture.width, left + part_width), min(picture.height, top + part_height))
    return picture.resize((width, height), Image.Resampling.LANCZOS, box=box)


def encoded(picture: Image.Image) -> bytes:
    out = io.BytesIO()
    picture.save(out, "PNG", compress_level=1)
    return out.getvalue()


if __name__ == "__main__":
    sys.exit(main())
