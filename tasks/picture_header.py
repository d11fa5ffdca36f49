"""What kind of picture some bytes are and how large, from their header alone. Decodes nothing and needs no library.

So a picture of a billion pixels is refused where it arrives, before anything makes room for it. That the rest of the
bytes is as the header says, only whoever decodes them learns.
"""

from dataclasses import dataclass
from typing import Literal

ContentType = Literal["image/png", "image/jpeg", "image/webp"]

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
#: JPEG markers that stand alone, without a length: TEM, RST0 to RST7, SOI.
BARE_MARKERS = {0x01, *range(0xD0, 0xD9)}
#: Start of frame, all codings; 0xC4, 0xC8 and 0xCC between them mean something else.
FRAME_MARKERS = set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}


class NoPicture(ValueError):
    """The bytes do not begin like a PNG, JPEG or WebP."""


@dataclass(frozen=True)
class PictureHeader:
    """Width and height in pixels as they are stored, before any rotation that metadata asks for."""

    content_type: ContentType
    width: int
    height: int


def read_header(data: bytes) -> PictureHeader:
    """Raises NoPicture."""
    try:
        if data.startswith(PNG_SIGNATURE):
            return _png(data)
        if data.startswith(b"\xff\xd8\xff"):
            return _jpeg(data)
        if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
            return _webp(data)
    except IndexError:
        raise NoPicture("the picture's header is cut short") from None
    raise NoPicture("the bytes are no PNG, JPEG or WebP")


def _png(data: bytes) -> PictureHeader:
    """Signature; length, "IHDR", width and height, 4 bytes each."""
    if data[12:16] != b"IHDR":
        raise NoPicture("the PNG does not begin with its IHDR chunk")
    return _sized("image/png", _number(data, 16, 4, "big"), _number(data, 20, 4, "big"))


def _jpeg(data: bytes) -> PictureHeader:
    """Segments of 0xFF, marker, length (2 bytes, itself included); a frame has precision, height, width."""
    place = 2
    while True:
        if data[place] != 0xFF:
            raise NoPicture("the JPEG's segments are damaged")
        while (marker := data[place]) == 0xFF:
            place += 1
        place += 1
        if marker in FRAME_MARKERS:
            return _sized("image/jpeg", _number(data, place + 5, 2, "big"), _number(data, place + 3, 2, "big"))
        if marker in (0xD9, 0xDA):
            raise NoPicture("the JPEG has no frame header before its data")
        if marker not in BARE_MARKERS:
            place += max(2, _number(data, place, 2, "big"))


def _webp(data: bytes) -> PictureHeader:
    """RIFF container; "VP8 " (lossy), "VP8L" (lossless) or "VP8X" (extended, whose canvas counts)."""
    kind = data[12:16]
    if kind == b"VP8X":
        return _sized("image/webp", 1 + _number(data, 24, 3, "little"), 1 + _number(data, 27, 3, "little"))
    if kind == b"VP8L" and data[20] == 0x2F:
        bits = _number(data, 21, 4, "little")
        return _sized("image/webp", 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF))
    if kind == b"VP8 " and data[23:26] == b"\x9d\x01\x2a":
        # The two highest bits of each say how a viewer may scale it.
        return _sized("image/webp", _number(data, 26, 2, "little") & 0x3FFF, _number(data, 28, 2, "little") & 0x3FFF)
    raise NoPicture("the WebP begins with no picture")


def _number(data: bytes, place: int, size: int, order: Literal["big", "little"]) -> int:
    if len(data) < place + size:
        raise IndexError
    return int.from_bytes(data[place : place + size], order)


def _sized(content_type: ContentType, width: int, height: int) -> PictureHeader:
    if width < 1 or height < 1:
        raise NoPicture("the picture has no width or no height")
    return PictureHeader(content_type, width, height)
