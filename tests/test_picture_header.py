"""A picture's kind and size are read from its header, as a decoder would say, and damage is told."""

import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from inferfleet.tasks.picture_header import NoPicture, read_header

SAVES = {
    "png": ("PNG", {}, "RGB"),
    "png_palette": ("PNG", {}, "P"),
    "png_grey16": ("PNG", {}, "I;16"),
    "jpeg": ("JPEG", {}, "RGB"),
    "jpeg_progressive": ("JPEG", {"progressive": True}, "RGB"),
    "jpeg_cmyk": ("JPEG", {}, "CMYK"),
    "jpeg_exif": ("JPEG", {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0", "comment": b"\xff" * 300}, "L"),
    "webp": ("WEBP", {}, "RGB"),
    "webp_lossless": ("WEBP", {"lossless": True}, "RGBA"),
    "webp_extended": ("WEBP", {"icc_profile": b"x" * 99}, "RGB"),
}


def encoded(name, width, height):
    kind, options, mode = SAVES[name]
    out = io.BytesIO()
    Image.new(mode, (width, height)).save(out, kind, **options)
    return out.getvalue()


@pytest.mark.parametrize("name", SAVES)
@pytest.mark.parametrize("size", [(1, 1), (17, 300), (4000, 3)])
def test_kind_and_size_are_those_that_were_saved(name, size):
    header = read_header(encoded(name, *size))
    assert (header.content_type, header.width, header.height) == (f"image/{name.partition('_')[0]}", *size)


@pytest.mark.parametrize("name", SAVES)
def test_a_header_that_is_cut_short_is_no_picture(name):
    whole = encoded(name, 64, 64)
    for length in range(24):
        with pytest.raises(NoPicture):
            read_header(whole[:length])


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"GIF89a" + bytes(40),
        b"\x89PNG\r\n\x1a\n" + bytes(40),
        b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes(40),
        b"\xff\xd8\xff\xd9" + bytes(40),
        b"\xff\xd8\xff\xe0\0\x04ab\0\0\0",
        b"\xff\xd8\xff\xe0\0\0" * 3,
        b"\xff\xd8\xff\xc0\0\x11\x08\0\0\0\x10\x03",
        b"RIFF\0\0\0\0WEBPVP8 " + bytes(40),
        b"RIFF\0\0\0\0WEBPALPH" + bytes(40),
    ],
)
def test_what_is_no_picture_is_told(data):
    with pytest.raises(NoPicture):
        read_header(data)


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from([b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", b"RIFF\0\0\0\0WEBPVP8"]),
    st.binary(max_size=60),
)
def test_any_bytes_are_a_picture_with_a_size_or_none(start, rest):
    try:
        header = read_header(start + rest)
    except NoPicture:
        return
    assert header.width >= 1 and header.height >= 1
