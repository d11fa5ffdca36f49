"""The door of image jobs: every bad body is a typed error with the field and the limit; good ones pass whole."""

import io
import json
import struct
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from inferfleet.tasks import names
from inferfleet.tasks.contracts import (
    ImageEditRequest,
    ImageGenerationRequest,
    JobRequest,
    check_card,
    data_url,
    parse_chat,
    parse_edit,
    parse_images,
    parse_job,
)
from inferfleet.tasks.contracts.images import MAX_INIT_BYTES, UNSERVED
from inferfleet.tasks.errors import FleetError, InvalidRequest, RequestError, UnsupportedFeature

GOOD = {"model": "flux", "prompt": "a red circle"}


def png(width=8, height=8):
    out = io.BytesIO()
    Image.new("RGB", (width, height)).save(out, "PNG")
    return out.getvalue()


def claimed_png(width, height):
    """A PNG whose header claims a size that its data does not have."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))


PICTURE = data_url(png(), "image/png")


def body(**changes):
    return json.dumps(GOOD | changes).encode()


def refusal(parse, raw):
    with pytest.raises(RequestError) as caught:
        parse(raw)
    return caught.value


BAD = [
    ({"promt": "x"}, "promt", "unknown field"),
    ({"negative_prompt": "x"}, "negative_prompt", "unknown field"),
    ({"prompt": ""}, "prompt", "empty"),
    ({"prompt": "x" * 10_001}, "prompt", "at most 10000"),
    ({"prompt": None}, "prompt", "string"),
    ({"model": ""}, "model", "empty"),
    ({"n": 0}, "n", "at least 1"),
    ({"n": 10_000}, "n", "at most 10"),
    ({"n": True}, "n", "whole number"),
    ({"width": 17, "height": 16}, "width", "multiple of 16"),
    ({"width": 0, "height": 16}, "width", "16"),
    ({"width": 16, "height": 100_000}, "height", "4096"),
    ({"width": 16}, "height", "together"),
    ({"height": 16}, "width", "together"),
    ({"width": 4096, "height": 4096}, "width", "4194304"),
    ({"size": "4096x4096"}, "size", "4194304"),
    ({"size": "17x16"}, "size", "multiple of 16"),
    ({"size": "0x0"}, "size", "between 16 and 4096"),
    ({"size": "99999x16"}, "size", "between 16 and 4096"),
    ({"size": "large"}, "size", "WIDTHxHEIGHT"),
    ({"size": "1024×1024"}, "size", "WIDTHxHEIGHT"),
    ({"size": "١٦x١٦"}, "size", "WIDTHxHEIGHT"),
    ({"size": "16x16", "width": 16, "height": 16}, "size", "not both"),
    ({"num_inference_steps": 0}, "num_inference_steps", "1"),
    ({"num_inference_steps": 10**6}, "num_inference_steps", "100"),
    ({"guidance_scale": -1}, "guidance_scale", "0"),
    ({"guidance_scale": 31}, "guidance_scale", "30"),
    ({"seed": -1}, "seed", "0"),
    ({"seed": 2**63 - 1}, "seed", str(2**63 - 11)),
    ({"output_format": "gif"}, "output_format", "'webp'"),
    ({"output_compression": 101, "output_format": "jpeg"}, "output_compression", "100"),
    ({"output_compression": 50}, "output_compression", "jpeg or webp"),
    ({"output_compression": 50, "output_format": "png"}, "output_compression", "jpeg or webp"),
    ({"response_format": "file"}, "response_format", "'b64_json'"),
    ({"max_sequence_length": 513}, "max_sequence_length", "512"),
    ({"loras": [{"name": "a", "scale": 2.5}]}, "loras.0.scale", "2"),
    ({"loras": [{"name": "a"}, {"name": "a"}]}, "loras", "twice"),
    ({"loras": [{"name": str(i)} for i in range(5)]}, "loras", "at most 4"),
    ({"loras": [{"name": "a", "weight": 1}]}, "loras.0.weight", "unknown field"),
    ({"preview_every": 0}, "preview_every", "1"),
    ({"embed_prompt": 1}, "embed_prompt", "true or false"),
    ({"strength": 0.5}, "strength", "unknown field"),
    ({"priority": 101}, "priority", "100"),
]


@pytest.mark.parametrize(("change", "param", "said"), BAD, ids=lambda value: str(value)[:40])
def test_a_bad_field_is_refused_with_its_path_and_its_limit(change, param, said):
    error = refusal(parse_images, body(**change))
    assert (error.status, error.code, error.param) == (422, "invalid_request", param)
    assert said in error.message
    # the same inside a job, under its path there
    inside = refusal(parse_job, json.dumps({"url": names.IMAGES_URL, "body": GOOD | change}).encode())
    assert inside.param == f"body.{param}"


@pytest.mark.parametrize("literal", ["Infinity", "NaN", "1e999"])
def test_a_guidance_that_is_no_number_is_no_json(literal):
    raw = body(guidance_scale=0).replace(b'"guidance_scale": 0', b'"guidance_scale": ' + literal.encode())
    assert refusal(parse_images, raw).status == 400


EDITS_BAD = [
    ({"image": None}, "image", "string"),
    ({"image": "https://example.org/a.png"}, "image", "data URL"),
    ({"image": "data:image/gif;base64,AAAA"}, "image", "data URL"),
    ({"image": [PICTURE]}, "image", "string"),
    ({"image": PICTURE[:-1]}, "image", "base64"),
    ({"image": PICTURE + "\n"}, "image", "base64"),
    ({"image": PICTURE[:60] + " " + PICTURE[60:]}, "image", "base64"),
    ({"image": PICTURE.replace("png", "webp")}, "image", "its bytes are image/png"),
    ({"image": "data:image/png;base64,"}, "image", "no PNG"),
    ({"image": data_url(b"\x89PNG\r\n\x1a\n", "image/png")}, "image", "IHDR"),
    ({"image": data_url(claimed_png(100_000, 1), "image/png")}, "image", "8192"),
    ({"image": data_url(claimed_png(8192, 8192), "image/png")}, "image", "40000000"),
    ({"image": data_url(claimed_png(1, 1) + bytes(MAX_INIT_BYTES), "image/png")}, "image", "27962"),
    ({"image": PICTURE, "strength": 2}, "strength", "1"),
    ({"image": PICTURE, "strength": 0}, "strength", "greater than 0"),
]


@pytest.mark.parametrize(("change", "param", "said"), EDITS_BAD, ids=lambda value: str(value)[:40])
def test_a_bad_picture_or_strength_of_an_edit_is_refused_with_the_limit(change, param, said):
    error = refusal(parse_edit, body(**change))
    assert (error.status, error.param) == (422, param)
    assert said in error.message
    inside = refusal(parse_job, json.dumps({"url": names.EDITS_URL, "body": GOOD | change}).encode())
    assert inside.param == f"body.{param}"


def test_a_picture_of_the_largest_size_passes_and_one_byte_more_does_not():
    start = claimed_png(8192, 4882)
    largest = data_url(start + bytes(MAX_INIT_BYTES - len(start)), "image/png")
    assert len(parse_edit(body(image=largest)).init_image) == MAX_INIT_BYTES
    one_more = data_url(start + bytes(MAX_INIT_BYTES - len(start) + 1), "image/png")
    assert str(MAX_INIT_BYTES) in refusal(parse_edit, body(image=one_more)).message


def test_an_edit_needs_its_picture():
    assert refusal(parse_edit, body()).param == "image"


@pytest.mark.parametrize("name", UNSERVED)
def test_what_is_not_served_is_refused_with_what_to_use_instead(name):
    error = refusal(parse_images, body(**{name: "high"}))
    assert (type(error), error.param) == (UnsupportedFeature, name)
    assert UNSERVED[name][1] in error.message
    assert parse_images(body(**{name: None})) == parse_images(body())


@pytest.mark.parametrize(
    "said", [{"quality": "auto"}, {"stream": False}, {"partial_images": 0}, {"moderation": "auto"}]
)
def test_what_changes_nothing_passes(said):
    assert parse_images(body(**said)) == parse_images(body())


@pytest.mark.parametrize("said", [{"quality": "hd"}, {"stream": 0}, {"partial_images": False}, {"quality": []}])
def test_what_only_looks_harmless_is_refused(said):
    assert isinstance(refusal(parse_images, body(**said)), UnsupportedFeature)


def test_the_url_of_a_job_picks_the_class_of_its_body():
    wanted = {
        names.IMAGES_URL: (GOOD, ImageGenerationRequest),
        names.EDITS_URL: (GOOD | {"image": PICTURE}, ImageEditRequest),
    }
    for url, (values, kind) in wanted.items():
        job = parse_job(json.dumps({"url": url, "body": values}).encode())
        assert type(job.body) is kind
        assert parse_job(job.envelope()) == job
        assert JobRequest.model_validate_json(job.envelope()) == job
        assert JobRequest.from_body(job.body) == job


@pytest.mark.parametrize(
    ("values", "param"),
    [
        ({"body": GOOD}, "body.messages"),
        ({"url": names.IMAGES_URL, "body": {"model": "m", "messages": []}}, "body.prompt"),
        ({"url": names.IMAGES_URL, "body": GOOD | {"image": PICTURE}}, "body.image"),
        ({"url": "/v1/images/variations", "body": GOOD}, "url"),
        ({"url": names.IMAGES_URL}, "body"),
        ({"url": names.IMAGES_URL, "body": [1]}, "body"),
    ],
)
def test_a_body_of_another_kind_than_the_url_says_is_refused(values, param):
    assert refusal(parse_job, json.dumps(values).encode()).param == param


def test_what_goes_to_the_engine_names_only_fields_that_it_has():
    from dataclasses import fields

    from inferfleet.engine.diffusion.params import ImageParams

    everything = {
        "n": 2, "size": "64x32", "num_inference_steps": 3, "guidance_scale": 1, "seed": 5, "output_format": "webp",
        "output_compression": 7, "response_format": "b64_json", "max_sequence_length": 9, "preview_every": 1,
        "loras": [{"name": "a", "scale": -1}, {"name": "b"}], "embed_prompt": True, "user": "u", "priority": 3,
        "image": PICTURE, "strength": 0.25,
    }  # fmt: skip
    said = parse_edit(body(**everything)).painting()
    assert said == {
        "prompt": "a red circle", "n": 2, "width": 64, "height": 32, "num_inference_steps": 3, "guidance_scale": 1.0,
        "seed": 5, "output_format": "webp", "output_compression": 7, "max_sequence_length": 9, "preview_every": 1,
        "loras": [{"name": "a", "scale": -1.0}, {"name": "b", "scale": 1.0}], "embed_prompt": True, "strength": 0.25,
    }  # fmt: skip
    assert set(said) <= {field.name for field in fields(ImageParams)}
    assert parse_images(body()).painting() == {"prompt": "a red circle"}
    assert parse_images(body(size="auto")).painting() == {"prompt": "a red circle"}


CARD = {"kind": "image", "guided": True, "loras": ["ink"], "max_pixels": 256 * 256, "max_side": 512, "multiple_of": 32,
        "max_steps": 8, "max_sequence_length": 64}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "param", "limit"),
    [
        ({"num_inference_steps": 9}, "num_inference_steps", "8"),
        ({"max_sequence_length": 65}, "max_sequence_length", "64"),
        ({"loras": [{"name": "oil"}]}, "loras", "'ink'"),
        ({"width": 48, "height": 32}, "width", "32"),
        ({"width": 32, "height": 48}, "height", "32"),
        ({"size": "1024x32"}, "size", "512"),
        ({"width": 256, "height": 288}, "width", "65536"),
    ],
)
def test_a_request_beyond_its_model_is_refused_with_the_limit(change, param, limit):
    with pytest.raises(InvalidRequest) as caught:
        check_card(parse_images(body(**change)), CARD)
    assert caught.value.param == param
    assert limit in caught.value.message


def test_guidance_is_refused_where_the_model_has_none():
    unguided = CARD | {"guided": False}
    check_card(parse_images(body(guidance_scale=0)), unguided)
    with pytest.raises(InvalidRequest, match="no guidance"):
        check_card(parse_images(body(guidance_scale=3.5)), unguided)
    check_card(parse_images(body(guidance_scale=3.5)), CARD)


def test_a_request_within_its_model_passes_and_an_empty_card_refuses_nothing():
    check_card(parse_images(body(size="256x256", num_inference_steps=8, loras=[{"name": "ink"}])), CARD)
    check_card(parse_images(body(size="2048x2048", num_inference_steps=100, loras=[{"name": "any"}])), {})


def test_a_job_for_a_model_of_another_kind_is_told_the_right_url():
    chat = parse_chat(b'{"model": "flux", "messages": [{"role": "user", "content": "hi"}]}')
    with pytest.raises(InvalidRequest, match="/v1/images/generations or /v1/images/edits") as caught:
        check_card(chat, CARD)
    assert caught.value.param == "model"
    with pytest.raises(InvalidRequest, match="/v1/chat/completions"):
        check_card(parse_images(body()), {"kind": "text"})
    check_card(chat, {"kind": "text"})


@settings(max_examples=150, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=True) | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=8,
    ),
    st.sampled_from([*ImageEditRequest.model_fields, *UNSERVED, "what"]),
)
def test_any_value_in_any_field_is_accepted_or_refused_with_a_typed_error(value, name):
    try:
        parse_edit(json.dumps(GOOD | {"image": PICTURE} | {name: value}).encode())
    except FleetError as error:
        assert error.status in (400, 422)
