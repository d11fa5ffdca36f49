"""A picture edit as a form: how its parts are read, and how text becomes the contract's values."""

import asyncio
import json
import struct
import zlib
from collections.abc import Iterable
from types import SimpleNamespace

import pytest
from fastapi import FastAPI, Request

from inferfleet.tasks.contracts import data_url
from inferfleet.tasks.errors import BodyTooLarge, FleetError, InvalidRequest, UnsupportedFeature, UnsupportedMediaType
from inferfleet.tasks.settings import Settings
from inferfleet.workers.api.image_form import parse_edit_form
from inferfleet.workers.api.multipart import MAX_PARTS, MAX_TEXT_BYTES, Part, read_form

BOUNDARY = "line"
LIMIT = 1 << 20


def png(width: int = 16, height: int = 16) -> bytes:
    """A whole grey PNG."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = zlib.compress(b"".join(b"\0" + b"\x80" * width for _ in range(height)))
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def body(*parts: tuple[str, bytes]) -> bytes:
    """Parts of a header block and data."""
    lines = b"".join(f"--{BOUNDARY}\r\n{head}\r\n\r\n".encode() + data + b"\r\n" for head, data in parts)
    return lines + f"--{BOUNDARY}--\r\n".encode()


def field(name: str, value: str) -> tuple[str, bytes]:
    return f'Content-Disposition: form-data; name="{name}"', value.encode()


def upload(name: str, data: bytes, extra: str = "") -> tuple[str, bytes]:
    return f'Content-Disposition: form-data; name="{name}"; filename="a.png"{extra}', data


def read(raw: bytes, *, size: int = 1 << 20, limit: int = LIMIT, **headers: str) -> list[Part]:
    """read_form over a body that arrives in pieces of `size` bytes."""
    pieces = [raw[start : start + size] for start in range(0, len(raw), size)]
    messages = [{"type": "http.request", "body": piece, "more_body": True} for piece in pieces]
    messages.append({"type": "http.request", "body": b"", "more_body": False})

    async def receive() -> dict:
        return messages.pop(0)

    given = {"content-type": f"multipart/form-data; boundary={BOUNDARY}"} | {
        name.replace("_", "-"): value for name, value in headers.items()
    }
    scope = {"type": "http", "headers": [(name.encode(), value.encode("latin-1")) for name, value in given.items()]}
    app = FastAPI()
    app.state.services = SimpleNamespace(settings=Settings())
    return asyncio.run(read_form(Request(scope | {"app": app}, receive), limit))


def refusal(raw: bytes, **kwargs) -> FleetError:
    with pytest.raises(FleetError) as caught:
        read(raw, **kwargs)
    return caught.value


def edit(*texts: tuple[str, str], files: Iterable[tuple[str, bytes]] = (("image", png()),)):
    parts = [Part(name, False, bytearray(text.encode())) for name, text in (("model", "flux"), ("prompt", "a"), *texts)]
    return parse_edit_form([*parts, *(Part(name, True, bytearray(data)) for name, data in files)])


# Parts ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 7, 64, 1 << 20])
def test_a_form_is_the_same_however_it_arrives(size):
    # Given a file that holds line breaks and most of a boundary, when it comes in pieces, then each byte is kept.
    data = png() + b"\r\n--lin\r\n--line"[:-1] + bytes(range(256))
    parts = read(body(field("prompt", "a red circle"), upload("image", data)), size=size)

    assert [(part.name, part.is_file) for part in parts] == [("prompt", False), ("image", True)]
    assert parts[0].text == "a red circle"
    assert bytes(parts[1].data) == data


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "closing boundary"),
        (b"nonsense", "damaged"),
        (body(field("prompt", "x"))[:-8], "closing boundary"),
        (body(upload("image", png()))[:60], "closing boundary"),
        (body(("Content-Type: text/plain", b"x")), "Content-Disposition"),
        (body(("Content-Disposition: attachment; name=a", b"x")), "Content-Disposition"),
        (body((f'Content-Disposition: form-data; name="{"x" * 300}"', b"x")), "256"),
        (body((f"Content-Disposition: form-data; name=a\r\nX: {'y' * 5000}", b"x")), "damaged"),
        (body(*[field(f"f{n}", "x") for n in range(MAX_PARTS + 1)]), str(MAX_PARTS)),
        (body((field("a", "")[0] + "\r\nContent-Transfer-Encoding: base64", b"eA==")), "Transfer-Encoding"),
    ],
)
def test_a_damaged_form_is_refused_in_words(raw, words):
    error = refusal(raw)

    assert isinstance(error, InvalidRequest)
    assert words in error.message


def test_a_form_is_bounded_in_all_and_field_by_field():
    large = body(upload("image", b"x" * LIMIT))

    assert isinstance(refusal(large), BodyTooLarge)
    assert isinstance(refusal(large, content_length=str(len(large))), BodyTooLarge)
    long = refusal(body(field("prompt", "x" * (MAX_TEXT_BYTES + 1))))
    assert (type(long), str(MAX_TEXT_BYTES) in long.message) == (BodyTooLarge, True)


@pytest.mark.parametrize("header", ["multipart/form-data", f"multipart/form-data; boundary={'x' * 71}"])
def test_a_form_without_a_usable_boundary_is_refused(header):
    assert refusal(body(field("a", "b")), content_type=header).param == "Content-Type"


def test_a_compressed_form_and_text_that_is_not_utf_8_are_refused():
    assert isinstance(refusal(body(field("a", "b")), content_encoding="gzip"), UnsupportedMediaType)
    (part,) = read(body((field("prompt", "")[0], b"\xed\xa0\x80")))
    with pytest.raises(InvalidRequest) as caught:
        _ = part.text
    assert caught.value.param == "prompt"


# Values --------------------------------------------------------------------------------------------------------------


def test_text_becomes_the_values_that_a_json_body_has():
    asked = edit(
        ("n", "2"), ("size", "512x256"), ("seed", "7"), ("guidance_scale", "3.5"), ("strength", "1"),
        ("embed_prompt", "true"), ("output_format", "jpeg"), ("stream", "false"), ("partial_images", "0"),
        ("metadata[team]", "a"), ("loras[][name]", "ink"), ("loras[][scale]", "0.5"), ("priority", "-3"),
    )  # fmt: skip

    assert (asked.n, asked.size, asked.seed, asked.guidance_scale) == (2, "512x256", 7, 3.5)
    assert (asked.strength, asked.embed_prompt, asked.output_format, asked.priority) == (1.0, True, "jpeg", -3)
    assert asked.metadata == {"team": "a"}
    assert [(lora.name, lora.scale) for lora in asked.loras] == [("ink", 0.5)]
    assert asked.image == data_url(png(), "image/png")


@pytest.mark.parametrize(
    "texts",
    [
        [("loras", json.dumps([{"name": "a", "scale": 0.5}, {"name": "b", "scale": -1}]))],
        [("loras[0][name]", "a"), ("loras[0][scale]", "0.5"), ("loras[1][scale]", "-1"), ("loras[1][name]", "b")],
        [("loras[][name]", "a"), ("loras[][name]", "b"), ("loras[][scale]", "0.5"), ("loras[][scale]", "-1")],
    ],
)
def test_adapters_are_told_as_json_by_number_or_in_columns(texts):
    assert [(lora.name, lora.scale) for lora in edit(*texts).loras] == [("a", 0.5), ("b", -1.0)]


def test_an_image_may_be_named_as_a_list_of_one():
    assert edit(files=[("image[]", png())]).init_image == png()


@pytest.mark.parametrize(
    ("texts", "param", "words"),
    [
        ([("n", "two")], "n", "whole number"),
        ([("n", "1.0")], "n", "whole number"),
        ([("n", " 1")], "n", "whole number"),
        ([("n", "9" * 50)], "n", "whole number"),
        ([("n", "10000")], "n", "10"),
        ([("seed", "-1")], "seed", "0"),
        ([("guidance_scale", "inf")], "guidance_scale", "a number"),
        ([("guidance_scale", "NaN")], "guidance_scale", "a number"),
        ([("guidance_scale", "1e999")], "guidance_scale", "a number"),
        ([("strength", "2")], "strength", "1"),
        ([("strength", "")], "strength", "a number"),
        ([("embed_prompt", "yes")], "embed_prompt", "true or false"),
        ([("stream", "true")], "stream", "not served"),
        ([("mask", "x")], "mask", "not served"),
        ([("metadata", "x")], "metadata", "JSON"),
        ([("metadata[a]", "1"), ("metadata[a]", "2")], "metadata", "one object"),
        ([("loras", "[")], "loras", "JSON"),
        ([("loras[]", "a")], "loras.0", "Lora"),
        ([("loras[][name]", "a"), ("loras[][name]", "b"), ("loras[][scale]", "1")], "loras", "JSON"),
        ([("loras[0][name]", "a"), ("loras[0][name]", "b")], "loras", "twice"),
        ([("loras[0][scale]", "x")], "loras.scale", "a number"),
        ([("prompt", "again")], "prompt", "twice"),
        ([("n", "1"), ("n[]", "1")], "n", "twice"),
        ([("image", "cat.png")], "image", "file"),
        ([("colour", "red")], "colour", "unknown"),
        ([("user", "a\0b")], "user", "NUL"),
    ],
)
def test_a_field_that_is_wrong_is_refused_by_its_name(texts, param, words):
    with pytest.raises(FleetError) as caught:
        edit(*texts)

    assert 400 <= caught.value.status < 500
    assert (caught.value.param, words in caught.value.message) == (param, True), caught.value.message


@pytest.mark.parametrize(
    ("files", "kind", "param"),
    [
        ([], InvalidRequest, "image"),
        ([("image", b"")], InvalidRequest, "image"),
        ([("image", b"GIF89a")], InvalidRequest, "image"),
        ([("image", png()[:20])], InvalidRequest, "image"),
        ([("image", png(8208, 16)[:60])], InvalidRequest, "image"),
        ([("image", png()), ("image", png())], UnsupportedFeature, "image"),
        ([("image[]", png()), ("image[]", png())], UnsupportedFeature, "image"),
        ([("image", png()), ("mask", png())], UnsupportedFeature, "mask"),
        ([("image", png()), ("prompt2", png())], InvalidRequest, "prompt2"),
    ],
)
def test_only_one_picture_is_taken_and_it_must_be_one(files, kind, param):
    with pytest.raises(FleetError) as caught:
        edit(files=files)

    assert (type(caught.value), caught.value.param) == (kind, param)
