"""Pictures that jobs bring: painted at the size that was asked for, and nothing that is in one reaches the worker."""

import io
import os
import struct
import sys
import threading
import time
import zlib

import pytest
from PIL import Image

from inferfleet.tasks.errors import EngineError, InvalidRequest
from inferfleet.workers.media import MAX_DECODERS, Media

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def saved(picture, kind="PNG", **options):
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()


def painted(data, width=32, height=32):
    """The picture that the engine would get."""
    png = Media().picture(data, width, height)
    picture = Image.open(io.BytesIO(png), formats=["PNG"])
    picture.load()
    assert (picture.mode, picture.size) == ("RGB", (width, height))
    return picture


def near(pixel, colour, within=6):
    return all(abs(a - b) <= within for a, b in zip(pixel, colour, strict=True))


def halves(mode, left, right, size=(40, 20)):
    picture = Image.new(mode, size, right)
    picture.paste(left, (0, 0, size[0] // 2, size[1]))
    return picture


def deep(left, right):
    """Grey of 16 bits."""
    picture = Image.new("I;16", (40, 20))
    for place in range(40 * 20):
        picture.putpixel((place % 40, place // 40), left if place % 40 < 20 else right)
    return picture


def test_a_wide_picture_covers_a_square_and_loses_its_sides():
    # given red, green and blue thirds, of which a square sees the middle
    picture = Image.new("RGB", (96, 32), GREEN)
    picture.paste(RED, (0, 0, 32, 32))
    picture.paste(BLUE, (64, 0, 96, 32))
    square = painted(saved(picture))
    assert all(near(square.getpixel((x, 16)), GREEN) for x in (1, 16, 30))
    tall = painted(saved(picture.rotate(90, expand=True)), 16, 48)
    assert [near(tall.getpixel((8, y)), c) for y, c in ((2, BLUE), (24, GREEN), (45, RED))] == [True] * 3


def test_a_picture_of_one_pixel_fills_the_whole():
    picture = painted(saved(Image.new("RGB", (1, 1), RED)), 48, 16)
    assert picture.getextrema() == ((255, 255), (0, 0), (0, 0))


@pytest.mark.parametrize(
    ("name", "data", "left", "right"),
    [
        ("palette", saved(halves("RGB", RED, BLUE).quantize(4)), RED, BLUE),
        ("grey", saved(halves("L", 0, 200)), (0, 0, 0), (200, 200, 200)),
        ("one bit", saved(halves("1", 0, 1)), (0, 0, 0), WHITE),
        ("16 bit grey", saved(deep(0x4000, 0xFFFF)), (64, 64, 64), WHITE),
        ("alpha", saved(halves("RGBA", (255, 0, 0, 255), (0, 0, 0, 0))), RED, WHITE),
        ("grey alpha", saved(halves("LA", (0, 255), (0, 0))), (0, 0, 0), WHITE),
        ("half alpha webp", saved(halves("RGBA", (255, 0, 0, 255), (0, 0, 255, 128)), "WEBP", lossless=True), RED,
         (127, 127, 255)),
        ("cmyk", saved(halves("CMYK", (0, 255, 255, 0), (255, 255, 0, 0)), "JPEG", quality=95), RED, BLUE),
        ("webp", saved(halves("RGB", RED, BLUE), "WEBP", lossless=True), RED, BLUE),
    ],
)  # fmt: skip
def test_every_mode_becomes_opaque_rgb(name, data, left, right):
    picture = painted(data, 64, 32)
    assert near(picture.getpixel((8, 16)), left)
    assert near(picture.getpixel((56, 16)), right)


def test_transparency_by_a_colour_of_the_palette_becomes_white():
    picture = halves("RGB", RED, BLUE).quantize(2)
    blue = picture.getpixel((30, 10))
    shown = painted(saved(picture, transparency=blue), 64, 32)
    assert near(shown.getpixel((8, 16)), RED)
    assert near(shown.getpixel((56, 16)), WHITE)


@pytest.mark.parametrize(("orientation", "top_left"), [(1, RED), (3, BLUE), (6, BLUE), (8, RED)])
def test_a_photograph_is_turned_as_its_exif_says(orientation, top_left):
    # given a picture that is red above and blue below, as a camera stores it turned
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = halves("RGB", RED, BLUE, size=(64, 64)).rotate(-90)
    turned = painted(saved(upright, "JPEG", exif=exif, quality=95), 64, 64)
    expected = {1: (32, 8), 3: (32, 8), 6: (8, 32), 8: (8, 32)}[orientation]
    assert near(turned.getpixel(expected), top_left, within=20)


def bomb(width, height, rows):
    """A PNG that claims a size and brings few rows, all zeros."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(bytes((4 * width + 1) * rows), 9))
    return b"\x89PNG\r\n\x1a\n" + header + body + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "data",
    [
        saved(Image.effect_noise((256, 256), 90))[:5000],
        saved(Image.effect_noise((256, 256), 90), "JPEG")[:3000],
        saved(Image.effect_noise((64, 64), 90), "WEBP", lossless=True)[:300],
        bomb(50_000, 50_000, 10),
        b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + b"\xff" * 60,
        b"",
        b"GIF89a" + bytes(100),
    ],
    ids=["cut png", "cut jpeg", "cut webp", "claims too much", "noise", "nothing", "gif"],
)
def test_a_damaged_or_huge_picture_is_the_fault_of_its_job(data):
    with pytest.raises(InvalidRequest) as caught:
        Media().picture(data, 32, 32)
    assert caught.value.param == "image"


def test_an_animation_is_refused():
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, BLUE)]
    with pytest.raises(InvalidRequest, match="animated"):
        Media().picture(saved(frames[0], "WEBP", save_all=True, append_images=frames[1:]), 32, 32)


@pytest.mark.slow
def test_the_largest_picture_that_the_contract_lets_pass_is_painted():
    picture = Image.new("RGBA", (8192, 4882), (255, 0, 0, 255))
    assert near(painted(saved(picture, compress_level=1)).getpixel((16, 16)), RED)


# The process ---------------------------------------------------------------------------------------------------------

PYTHON = (sys.executable, "-c")


def test_a_decoder_that_takes_too_long_is_ended():
    with pytest.raises(InvalidRequest, match=r"within 0\.3 s"):
        Media((*PYTHON, "import time; time.sleep(60)"), seconds=0.3).picture(b"x", 16, 16)


def test_a_decoder_that_dies_of_its_limits_is_the_fault_of_the_picture():
    with pytest.raises(InvalidRequest, match="1024 MiB"):
        Media((*PYTHON, "import os; os.kill(os.getpid(), 9)")).picture(b"x" * (1 << 20), 16, 16)


def test_a_decoder_that_is_told_to_end_is_not_the_fault_of_the_picture_and_another_takes_its_place(tmp_path):
    # given a service manager that stops every process of a service, the first decoder among them
    script = (
        f"import os, signal; p = {str(tmp_path / 'stopped')!r}\n"
        "if not os.path.exists(p): open(p, 'w').close(); os.kill(os.getpid(), signal.SIGTERM)\n"
        "print('painted', end='')"
    )
    assert Media((*PYTHON, script)).picture(b"x", 16, 16) == b"painted"
    with pytest.raises(EngineError, match="on this worker"):
        Media((*PYTHON, "import os; os.kill(os.getpid(), 15)")).picture(b"x", 16, 16)


def test_a_terminals_interrupt_does_not_reach_the_decoder():
    group = Media((*PYTHON, "import os; print(os.getpgid(0))")).picture(b"x", 16, 16)
    assert int(group) != os.getpgid(0)


def test_a_decoder_that_cannot_run_is_not():
    with pytest.raises(EngineError, match="No module named 'PIL'"):
        Media((*PYTHON, "raise ModuleNotFoundError(\"No module named 'PIL'\")")).picture(b"x", 16, 16)
    with pytest.raises(EngineError, match="can be started"):
        Media(("/nowhere/python",)).picture(b"x", 16, 16)


def test_no_more_than_a_few_decode_at_once(tmp_path):
    script = (
        f"import os, sys, time; p = {str(tmp_path)!r} + '/' + str(os.getpid()); open(p, 'w').close()\n"
        f"time.sleep(0.1); print(len(os.listdir({str(tmp_path)!r}))); os.remove(p)"
    )
    media, seen = Media((*PYTHON, script)), []
    threads = [threading.Thread(target=lambda: seen.append(int(media.picture(b"", 1, 1)))) for _ in range(8)]
    started = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 8 and max(seen) <= MAX_DECODERS
    assert time.monotonic() - started >= 0.1 * 8 / MAX_DECODERS
