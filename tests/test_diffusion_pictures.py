"""Pictures as files: what is inside them beside pixels, and PNG files that come in."""

from __future__ import annotations

import hashlib
import io
import json
import struct
import zlib

import pytest
import torch
from PIL import Image

from inferfleet.engine.diffusion.limits import Limits
from inferfleet.engine.diffusion.params import ImageParams, LoraChoice
from inferfleet.engine.diffusion.pictures import facts, read_init_image, to_file, to_pixels
from inferfleet.engine.errors import InvalidRequest

LIMITS = Limits.of(
    guided=True, max_sequence_length=512, default_size=64, max_pixels=1 << 22, vae_scale=8, lora_names=("ink",)
)
PIXELS = torch.randint(0, 256, (48, 64, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def about(**changes) -> dict[str, str]:
    usual = {"prompt": "ein Füchslein", "seed": 7, "width": 64, "height": 48, "num_inference_steps": 5}
    wanted = LIMITS.settle(ImageParams(**usual | changes))
    return facts(wanted, 2, model="lab/flux", commit="abc123", licence="apache-2.0")


def test_pixels_are_rounded_and_clamped():
    decoded = torch.tensor([-9.0, -1.0, -0.9961, 0.0, 0.5, 1.0, 9.0])[None, None].expand(3, 1, 7)
    assert to_pixels(decoded)[0, :, 0].tolist() == [0, 0, 0, 128, 191, 255, 255]
    assert to_pixels(decoded.bfloat16()).dtype == torch.uint8


def test_a_png_is_lossless_and_says_where_it_comes_from():
    image = Image.open(io.BytesIO(to_file(PIXELS, "png", None, about(loras=(LoraChoice(name="ink", scale=0.5),)))))
    assert image.tobytes() == PIXELS.numpy().tobytes()
    assert image.text == {
        "Software": "inferfleet",
        "model": "lab/flux",
        "revision": "abc123",
        "licence": "apache-2.0",
        "prompt_sha256": hashlib.sha256("ein Füchslein".encode()).hexdigest(),
        "seed": "9",
        "steps": "5",
        "guidance": "3.5",
        "loras": "ink:0.5",
        "size": "64x48",
    }


@pytest.mark.parametrize("form", ["png", "jpeg", "webp"])
def test_the_prompt_is_in_the_file_only_if_asked_for(form):
    without = to_file(PIXELS, form, None, about(output_format=form))
    assert "Füchslein".encode() not in without and b"chslein" not in without
    image = Image.open(io.BytesIO(to_file(PIXELS, form, None, about(output_format=form, embed_prompt=True))))
    image.load()
    found = image.text if form == "png" else json.loads(image.getexif()[0x010E])
    assert found["prompt"] == "ein Füchslein"


@pytest.mark.parametrize(("form", "kind"), [("jpeg", "JPEG"), ("webp", "WEBP")])
def test_jpeg_and_webp_have_their_facts_as_exif_and_the_quality_that_was_asked_for(form, kind):
    rough, fine = (to_file(PIXELS, form, quality, about(output_format=form)) for quality in (5, 95))
    assert len(rough) < len(fine) / 2
    image = Image.open(io.BytesIO(fine))
    assert (image.format, image.size) == (kind, (64, 48))
    assert image.getexif()[0x0131] == "inferfleet"
    assert json.loads(image.getexif()[0x010E])["seed"] == "9"


def test_the_longest_prompt_fits_where_it_is_allowed():
    for form, prompt in (("jpeg", "x" * 10_000), ("webp", "😀" * 10_000), ("png", "😀" * 10_000)):
        told = about(prompt=prompt, output_format=form, embed_prompt=True)
        image = Image.open(io.BytesIO(to_file(PIXELS, form, None, told)))
        image.load()
        assert (image.text if form == "png" else json.loads(image.getexif()[0x010E]))["prompt"] == prompt


def saved(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "1", "LA"])
def test_an_init_image_of_any_mode_is_read_as_rgb(mode):
    image = Image.fromarray(PIXELS.numpy()).convert(mode)
    pixels = read_init_image(saved(image), 64, 48)
    assert (pixels.dtype, tuple(pixels.shape)) == (torch.uint8, (48, 64, 3))
    if mode == "RGB":
        assert torch.equal(pixels, PIXELS)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no PNG"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 40, "no PNG"),
        (saved(Image.new("RGB", (64, 48)), "JPEG"), "no PNG"),
        (saved(Image.new("RGB", (48, 64))), "48 x 64, the picture 64 x 48"),
        (saved(Image.fromarray(PIXELS.numpy()))[:2000], "no PNG"),
    ],
)
def test_any_other_init_image_is_refused(data, message):
    with pytest.raises(InvalidRequest, match=message) as refusal:
        read_init_image(data, 64, 48)
    assert refusal.value.param == "image"


def test_a_bomb_is_refused_by_its_header():
    # Given a small file that claims 50,000 x 50,000 pixels, then its size is what is refused.
    header = b"IHDR" + struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    data = b"IDAT" + zlib.compress(bytes(1000))
    chunks = [struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part)) for part in (header, data)]
    with pytest.raises(InvalidRequest, match=r"50000 x 50000|decompression bomb"):
        read_init_image(b"\x89PNG\r\n\x1a\n" + b"".join(chunks), 64, 48)
