"""The picture routes as the OpenAI SDK, unchanged, uses them, and the urls of what they make."""

import base64
import hashlib
import io
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx2
import openai
import pytest
from hand_painter import SEED
from live_api import LiveApi, running_api, serving
from PIL import Image
from test_api_door import twisted

from inferfleet.tasks.settings import ImageSettings, ModelSpec
from inferfleet.workers.keys import digest, new_key
from inferfleet.workers.url_signing import signed_url

GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"
EDIT_LIMIT = 1 << 20
DEMO_MODEL = Path(__file__).parents[1] / "ops" / "demo_model"


@pytest.fixture(scope="module")
def shared_api(session_redis) -> Iterator[LiveApi]:
    models = {
        "unserved": ModelSpec(path="/nowhere"),
        "painter": ModelSpec(path="/nowhere", image=ImageSettings()),
        "writer": ModelSpec(path=str(DEMO_MODEL)),
    }
    with running_api(
        session_redis.url, served=("paper", "flux"), max_body_bytes=256 * 1024, max_edit_bytes=EDIT_LIMIT, models=models
    ) as api:
        yield api


def asked(**fields: Any) -> dict[str, Any]:
    return {"model": "flux", "prompt": "a red circle", **fields}


def photo(width: int = 32, height: int = 32, *, colour: tuple[int, int, int] = (9, 8, 7), kind: str = "png") -> bytes:
    kept = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(kept, format=kind)
    return kept.getvalue()


def opened(data: bytes) -> Image.Image:
    picture = Image.open(io.BytesIO(data))
    picture.load()
    return picture


def refusal(answer: httpx2.Response) -> tuple[int, str, str | None]:
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return answer.status_code, error["code"], error["param"]


def made(http: httpx2.Client, **fields: Any) -> dict[str, Any]:
    """A finished answer."""
    answer = http.post(GENERATIONS, json=asked(**fields))
    assert answer.status_code == 200, answer.text
    return answer.json()


# Answers -------------------------------------------------------------------------------------------------------------


def test_the_sdk_gets_urls_that_need_no_key_and_hold_the_pictures(api, http):
    done = api.sdk().images.generate(
        model="flux", prompt="a red circle", n=2, size="64x32", extra_body={"num_inference_steps": 3, "seed": 7}
    )

    assert [picture.seed for picture in done.data] == [7, 8]
    assert [picture.b64_json for picture in done.data] == [None, None]
    assert (done.size, done.output_format, done.usage.total_tokens) == ("64x32", "png", 37)
    assert (done.model, done.licence) == ("flux", "paper-licence")
    for index, picture in enumerate(done.data):
        file = httpx2.get(picture.url, trust_env=False)
        assert (file.status_code, file.headers["content-type"]) == (200, "image/png")
        assert opened(file.content).size == (64, 32)
        assert opened(file.content).getpixel((0, 0)) == (7 + index, 20 * index, 100)


def test_the_sdk_gets_base64_when_it_asks_for_it(api):
    done = api.sdk().images.generate(model="flux", prompt="x", response_format="b64_json", output_format="webp")

    picture = opened(base64.b64decode(done.data[0].b64_json))
    assert (picture.format, picture.size, done.data[0].url) == ("WEBP", (64, 64), None)


def test_the_sdk_edits_a_picture_that_it_opens(api, tmp_path):
    (tmp_path / "start.jpg").write_bytes(photo(colour=(200, 200, 200), kind="jpeg"))
    with (tmp_path / "start.jpg").open("rb") as file:
        done = api.sdk().images.edit(
            model="flux", image=file, prompt="warmer", response_format="b64_json",
            extra_body={"strength": 0.4, "seed": 5, "loras": [{"name": "ink", "scale": 0.5}], "embed_prompt": True},
        )  # fmt: skip

    assert opened(base64.b64decode(done.data[0].b64_json)).getpixel((0, 0)) == (200, 200, 200)
    assert done.data[0].seed == 5


def test_an_edit_as_json_and_as_a_form_is_the_same_job(http):
    image = photo(colour=(1, 2, 3))
    key = {"Idempotency-Key": f"edit {time.time()}"}
    url = f"data:image/png;base64,{base64.b64encode(image).decode()}"

    first = http.post(EDITS, json=asked(image=url, strength=0.5, seed=3), headers=key)
    again = http.post(EDITS, data=asked(strength="0.5", seed="3"), files={"image": ("a.png", image)}, headers=key)

    assert (first.status_code, again.status_code) == (200, 200), again.text
    assert again.headers["idempotency-replayed"] == "true"
    assert again.headers["x-job-id"] == first.headers["x-job-id"]
    assert again.json() == first.json()


def test_respond_async_gives_the_job_and_its_result_is_rendered_as_it_was_asked_for(api, http):
    answer = http.post(GENERATIONS, json=asked(response_format="b64_json"), headers={"Prefer": "respond-async"})
    assert (answer.status_code, answer.headers["preference-applied"]) == (202, "respond-async")
    assert answer.json()["endpoint"] == GENERATIONS

    job = http.get(answer.headers["location"], params={"wait": 30}).json()
    result = http.get(job["urls"]["result"]).json()

    assert (job["status"], job["progress"], job["progress_detail"]["step"]) == ("completed", 100, 4)
    (output,) = job["outputs"]
    data = base64.b64decode(result["data"][0]["b64_json"])
    assert output["hash"] == f"sha256:{hashlib.sha256(data).hexdigest()}"
    assert (output["size_bytes"], output["width"], output["seed"]) == (len(data), 64, SEED)
    assert httpx2.get(output["url"], trust_env=False).content == data
    assert output["url_expires_at"] == job["expires_at"]
    # In the job itself a picture is a url, however it was asked for.
    assert job["response"]["body"]["data"] == [{"index": 0, "seed": SEED, "url": output["url"]}]
    assert http.get("/v1/jobs", params={"model": "flux", "limit": 1}).json()["data"][0]["outputs"] == [output]


def test_prefer_wait_gives_the_pictures_in_time_and_else_the_job(http):
    quick = http.post(GENERATIONS, json=asked(), headers={"Prefer": "wait=20"})
    slow = http.post(GENERATIONS, json=asked(prompt="hold on"), headers={"Prefer": "wait=1"})

    assert (quick.status_code, "url" in quick.json()["data"][0]) == (200, True)
    assert (slow.status_code, slow.json()["status"]) == (202, "in_progress")
    assert slow.json()["progress_detail"] == {"step": 1, "steps": 4, "message": None}


def test_a_job_tells_its_steps_previews_and_pictures_as_events(http):
    job = http.post("/v1/jobs", json={"url": GENERATIONS, "body": asked(preview_every=2, n=2)}).json()
    with http.stream("GET", f"/v1/jobs/{job['id']}/events") as stream:
        lines = list(stream.iter_lines())

    events = [json.loads(line[6:]) for line in lines if line.startswith("data: ")]
    assert [event["type"] for event in events] == [
        "job.queued", "job.in_progress", "job.progress", "job.progress", "job.preview", "job.progress", "job.progress",
        "job.preview", "job.output", "job.output", "job.completed",
    ]  # fmt: skip
    assert [(event["step"], event["steps"]) for event in events if event["type"] == "job.progress"] == [
        (2, 8), (4, 8), (6, 8), (8, 8)
    ]  # fmt: skip
    assert "event: job.preview" in lines
    assert opened(base64.b64decode(events[4]["b64_json"])).size == (8, 8)
    assert [event["index"] for event in events if event["type"] == "job.output"] == [0, 1]


def test_an_edit_is_a_job_of_its_url_too(http):
    url = f"data:image/png;base64,{base64.b64encode(photo()).decode()}"
    job = http.post("/v1/jobs", json={"url": EDITS, "body": asked(image=url)}, headers={"Prefer": "wait=30"}).json()

    assert (job["status"], job["endpoint"]) == ("completed", EDITS)


def test_a_client_that_leaves_cancels_its_job_unless_it_named_a_key(api):
    sdk = api.sdk().with_options(timeout=0.5)
    with pytest.raises(openai.APITimeoutError):
        sdk.images.generate(model="flux", prompt="hold on", extra_headers={"Idempotency-Key": "mine to keep"})
    with pytest.raises(openai.APITimeoutError):
        sdk.images.generate(model="flux", prompt="hold on")

    assert api.worker.cancel_seen.wait(10)
    states = [record.state for record in api.worker.ledger.list("default", model="flux", limit=2).jobs]
    assert states == ["cancelled", "in_progress"]


def test_a_job_that_fails_is_the_error_of_its_code(api):
    with pytest.raises(openai.InternalServerError) as caught:
        api.sdk().images.generate(model="flux", prompt="fail nan_logits")

    assert (caught.value.code, caught.value.response.headers["x-should-retry"]) == ("nan_logits", "false")


def test_the_model_list_says_what_kind_each_is_and_what_pictures_may_be(api):
    cards = {card.id: card for card in api.sdk().models.list().data}

    flux = cards["flux"]
    assert (cards["paper"].kind, flux.kind) == ("text", "image")
    assert (flux.licence, flux.loras, flux.max_pixels, flux.max_steps) == ("paper-licence", ["ink", "wax"], 1 << 20, 50)


# Files ---------------------------------------------------------------------------------------------------------------


def test_a_file_says_what_it_is_and_never_runs_as_a_page(http):
    url = made(http, output_format="jpeg")["data"][0]["url"]
    file, head = http.get(url), http.head(url)

    assert file.headers["etag"] == f'"{hashlib.sha256(file.content).hexdigest()}"'
    assert file.headers["content-type"] == "image/jpeg"
    assert file.headers["x-content-type-options"] == "nosniff"
    assert "sandbox" in file.headers["content-security-policy"]
    assert file.headers["content-disposition"].endswith('-0.jpeg"')
    assert "immutable" in file.headers["cache-control"] and "private" in file.headers["cache-control"]
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == str(len(file.content))
    assert http.get(url, headers={"If-None-Match": file.headers["etag"]}).status_code == 304


def changed(url: str, **parameters: str) -> str:
    parts = urlsplit(url)
    values = {name: value[0] for name, value in parse_qs(parts.query).items()} | parameters
    return f"{parts.scheme}://{parts.netloc}{parts.path}?" + "&".join(f"{k}={v}" for k, v in values.items() if v)


def test_a_url_that_was_tampered_with_or_has_expired_opens_nothing(api, http):
    url = made(http)["data"][0]["url"]
    signature = parse_qs(urlsplit(url).query)["signature"][0]
    other = made(http)["data"][0]["url"]
    secret = api.worker.ledger.redis.get(f"{api.worker.ledger.prefix}signing")
    past = signed_url(api.url, urlsplit(url).path.rpartition("/")[2], int(time.time()) - 1, secret)

    for broken in (
        changed(url, expires="4102444800"),
        changed(url, expires="x"),
        changed(url, expires=""),
        changed(url, signature=""),
        changed(url, signature="%ed%a0%80"),
        changed(url, signature=signature[:-1] + ("0" if signature[-1] != "0" else "1")),
        changed(other, signature=signature),
        url.replace("/out_", "/out_0"),
    ):
        assert refusal(http.get(broken))[:2] == (403, "invalid_signature"), broken
    assert refusal(http.get(past)) == (403, "url_expired", "expires")
    assert http.get(url).status_code == 200


def test_a_deleted_job_takes_its_pictures_along(http):
    done = http.post(GENERATIONS, json=asked())
    url = done.json()["data"][0]["url"]

    assert http.delete(f"/v1/jobs/{done.headers['x-job-id']}").status_code == 200

    assert refusal(http.get(url)) == (404, "output_not_found", "output_id")


@pytest.mark.parametrize("name", ["out_1", "out_" + "0" * 32 + "_1_0", "..%2f..%2fetc", "job_" + "0" * 32])
def test_an_unknown_file_is_not_found_whatever_its_name(http, name):
    assert http.get(f"/v1/outputs/{name}").status_code == 404


def test_beyond_loopback_a_file_needs_its_url_or_a_key_of_its_tenant(session_redis):
    with running_api(session_redis.url, served=("flux",), api_host="0.0.0.0") as api, api.http() as http:
        mine, other = new_key(), new_key()
        api.worker.ledger.put_key(digest(mine), "mine", "")
        api.worker.ledger.put_key(digest(other), "other", "")
        own = {"authorization": f"Bearer {mine}"}
        url = http.post(GENERATIONS, json=asked(), headers=own).json()["data"][0]["url"]
        bare = url.partition("?")[0]

        assert http.get(url).status_code == 200
        assert http.get(bare, headers=own).content == http.get(url).content
        assert refusal(http.get(bare))[0] == 401
        assert refusal(http.get(bare, headers={"authorization": f"Bearer {other}"}))[0] == 404


def test_urls_begin_with_the_host_that_was_asked_or_with_the_setting(session_redis, api, http):
    assert made(http)["data"][0]["url"].startswith(f"{api.url}/v1/outputs/out_")
    named = http.post(GENERATIONS, json=asked(), headers={"Host": "pictures.example:81"}).json()
    assert named["data"][0]["url"].startswith("http://pictures.example:81/v1/outputs/")
    odd = http.post(GENERATIONS, json=asked(), headers={"Host": "a/b?c"})
    assert refusal(odd) == (422, "invalid_request", "Host")

    proxied = running_api(session_redis.url, served=("flux",), public_url="https://example.org/fleet/")
    with proxied as behind, behind.http() as other:
        url = made(other)["data"][0]["url"]
    assert url.startswith("https://example.org/fleet/v1/outputs/out_")


def test_every_api_process_signs_alike(session_redis, api, http):
    url = made(http)["data"][0]["url"]
    with serving(api.settings, api.worker.ring) as (second, _, _):
        path = url.removeprefix(api.url)
        assert httpx2.get(second + path, trust_env=False).status_code == 200


# Refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "param", "limit"),
    [
        ({"width": 17, "height": 64}, "width", "16"),
        ({"width": 0, "height": 64}, "width", "16"),
        ({"width": -64, "height": 64}, "width", "16"),
        ({"width": 64, "height": 100_000}, "height", "4096"),
        ({"width": 64}, "height", "together"),
        ({"size": "12x12x"}, "size", "WIDTHxHEIGHT"),
        ({"size": "64x100"}, "size", "16"),
        ({"size": "64x64", "width": 64, "height": 64}, "size", "not both"),
        ({"width": 4096, "height": 4096}, "width", "4194304"),
        ({"width": 2048, "height": 1024}, "width", "1048576"),
        ({"num_inference_steps": 0}, "num_inference_steps", "1"),
        ({"num_inference_steps": 10**6}, "num_inference_steps", "100"),
        ({"num_inference_steps": 51}, "num_inference_steps", "50"),
        ({"guidance_scale": 1e9}, "guidance_scale", "30"),
        ({"guidance_scale": -1}, "guidance_scale", "0"),
        ({"guidance_scale": "3"}, "guidance_scale", "number"),
        ({"n": 0}, "n", "1"),
        ({"n": 10_000}, "n", "10"),
        ({"n": True}, "n", "whole number"),
        ({"seed": -1}, "seed", "0"),
        ({"seed": 2**64}, "seed", "9223372036854775797"),
        ({"prompt": ""}, "prompt", "empty"),
        ({"prompt": "x" * 10_001}, "prompt", "10000"),
        ({"prompt": "a\0b"}, "prompt", "NUL"),
        ({"loras": [{"name": "unknown"}]}, "loras", "'ink', 'wax'"),
        ({"loras": [{"name": "ink", "scale": 3}]}, "loras.0.scale", "2"),
        ({"loras": [{"name": "ink"}, {"name": "ink"}]}, "loras", "twice"),
        ({"max_sequence_length": 65}, "max_sequence_length", "64"),
        ({"response_format": "xml"}, "response_format", "url"),
        ({"output_format": "gif"}, "output_format", "png"),
        ({"output_compression": 50}, "output_compression", "jpeg"),
        ({"preview_every": 0}, "preview_every", "1"),
        ({"quality": "high"}, "quality", "num_inference_steps"),
        ({"background": "transparent"}, "background", "opaque"),
        ({"stream": True}, "stream", "events"),
        ({"image": "x"}, "image", "unknown"),
        ({"colour": "red"}, "colour", "unknown"),
        ({"model": "nobody"}, "model", "nobody"),
        ({"model": "paper"}, "model", "/v1/chat/completions"),
        ({"priority": 101}, "priority", "100"),
    ],
)
def test_a_wrong_field_is_refused_by_its_name_and_limit(http, fields, param, limit):
    answer = http.post(GENERATIONS, json=asked(**fields))

    status, _, found = refusal(answer)
    assert (status, found) == (404 if fields == {"model": "nobody"} else 422, param), answer.text
    assert limit in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "raw", [b"", b"{", b'{"guidance_scale": NaN}', b'{"guidance_scale": Infinity}', b'{"prompt": "\\ud800"}']
)
def test_what_is_not_json_is_invalid_json(http, raw):
    for path in (GENERATIONS, EDITS):
        answer = http.post(path, content=raw, headers={"content-type": "application/json"})
        assert refusal(answer)[:2] == (400, "invalid_json")


@pytest.mark.parametrize(
    ("fields", "files", "param", "words"),
    [
        ({"strength": "2"}, {"image": photo()}, "strength", "1"),
        ({"strength": "0"}, {"image": photo()}, "strength", "0"),
        ({"strength": "nan"}, {"image": photo()}, "strength", "number"),
        ({"n": "many"}, {"image": photo()}, "n", "whole number"),
        ({}, {}, "image", "missing"),
        ({}, {"image": b"no picture at all"}, "image", "PNG, JPEG or WebP"),
        ({}, {"image": photo()[:16]}, "image", "cut short"),
        ({}, {"image": b"GIF89a" + bytes(20)}, "image", "PNG, JPEG or WebP"),
        ({}, {"image": photo(8208, 16)}, "image", "8192"),
        ({}, {"image": photo(8000, 8000, kind="webp")}, "image", "40000000"),
        ({}, {"image": photo(), "mask": photo()}, "mask", "strength"),
        ({"loras[][name]": "unknown"}, {"image": photo()}, "loras", "'ink'"),
        ({"model": "paper"}, {"image": photo()}, "model", "/v1/chat/completions"),
    ],
)
def test_a_wrong_form_is_refused_by_its_field(http, fields, files, param, words):
    form = {"model": "flux", "prompt": "x", **fields}
    parts = [(name, (None, value)) for name, value in form.items()]
    parts += [(name, (f"{name}.png", data)) for name, data in files.items()]

    answer = http.post(EDITS, files=parts)

    assert refusal(answer)[::2] == (422, param), answer.text
    assert words in answer.json()["error"]["message"]


def test_two_pictures_are_refused_as_what_is_not_served(api):
    with pytest.raises(openai.UnprocessableEntityError) as caught:
        api.sdk().images.edit(model="flux", image=[photo(), photo()], prompt="x")

    assert (caught.value.code, caught.value.param) == ("unsupported_feature", "image")


def test_bodies_of_other_kinds_and_too_large_ones_are_refused(http):
    form = {"content-type": "multipart/form-data"}
    assert refusal(http.post(EDITS, content=b"x", headers=form)) == (422, "invalid_request", "Content-Type")
    for path in (GENERATIONS, EDITS):
        plain = http.post(path, content=b"x", headers={"content-type": "text/plain"})
        assert refusal(plain) == (415, "unsupported_media_type", "Content-Type")
    assert "multipart/form-data" in plain.json()["error"]["message"]
    assert refusal(http.post(GENERATIONS, files={"image": ("a.png", photo())}))[0] == 415

    large = http.post(EDITS, files={"image": ("a.png", photo() + bytes(EDIT_LIMIT))}, data={"prompt": "x"})
    assert (refusal(large)[:2], str(EDIT_LIMIT) in large.text) == ((413, "body_too_large"), True)
    long = http.post(EDITS, files={"image": ("a.png", photo())}, data={"prompt": "x" * 70_000})
    assert (refusal(long)[:2], "65536" in long.text) == ((413, "body_too_large"), True)


def test_each_kind_of_model_refuses_the_others_jobs_and_names_their_route(http):
    chat = http.post("/v1/chat/completions", json={"model": "flux", "messages": [{"role": "user", "content": "hi"}]})
    job = http.post("/v1/jobs", json={"url": GENERATIONS, "body": asked(model="paper")})

    assert refusal(chat) == (422, "invalid_request", "model")
    assert GENERATIONS in chat.json()["error"]["message"]
    assert refusal(job) == (422, "invalid_request", "model")
    assert "/v1/chat/completions" in job.json()["error"]["message"]


def test_a_model_that_no_worker_has_loaded_is_of_the_kind_that_its_settings_or_its_folder_say(http):
    kinds = {card["id"]: card.get("kind") for card in http.get("/v1/models").json()["data"]}

    assert kinds == {"flux": "image", "painter": "image", "paper": "text", "unserved": None, "writer": "text"}
    chat = {"model": "painter", "messages": [{"role": "user", "content": "hi"}]}
    assert GENERATIONS in http.post("/v1/chat/completions", json=chat).json()["error"]["message"]
    assert "/v1/chat" in http.post(GENERATIONS, json=asked(model="writer")).json()["error"]["message"]


def test_the_document_describes_the_form_the_answer_and_the_file(http):
    document = http.get("/openapi.json").json()
    edits = document["paths"][EDITS]["post"]["requestBody"]["content"]

    form = document["components"]["schemas"][edits["multipart/form-data"]["schema"]["$ref"].rpartition("/")[2]]
    assert form["properties"]["image"] == {"type": "string", "format": "binary"}
    assert form["properties"]["strength"]
    assert "application/json" in edits
    assert "image/webp" in document["paths"]["/v1/outputs/{output_id}"]["get"]["responses"]["200"]["content"]
    http.get("/v1/outputs/out_0")
    assert 'route="/v1/outputs/{output_id}"' in http.get("/metrics").text


@pytest.mark.parametrize("seed", range(2))
def test_whatever_is_sent_is_answered_and_never_breaks_the_server(http, seed):
    rng = random.Random(seed)
    image = f"data:image/png;base64,{base64.b64encode(photo()).decode()}"
    whole = asked(
        model="unserved", n=2, size="64x64", loras=[{"name": "ink", "scale": 0.5}], seed=1, strength=0.5, image=image,
        metadata={"a": "b"}, guidance_scale=3.5, mask=None, output_format="png", preview_every=2,
    )  # fmt: skip
    for _ in range(100):
        raw = bytearray(json.dumps(twisted(whole, rng)).encode())
        if rng.random() < 0.3:
            raw[rng.randrange(len(raw))] = rng.randrange(256)
        headers = {"content-type": "application/json", "prefer": "respond-async"}
        answer = http.post(EDITS, content=bytes(raw), headers=headers)
        if answer.status_code != 202:
            assert 400 <= refusal(answer)[0] < 500, bytes(raw)


def test_a_form_that_was_cut_or_changed_anywhere_is_answered(http):
    rng = random.Random(3)
    form = [("model", (None, "unserved")), ("prompt", (None, "x")), ("loras[][name]", (None, "ink"))]
    request = http.build_request("POST", EDITS, files=[*form, ("image", ("a.png", photo()))])
    raw = request.read()
    headers = {"content-type": request.headers["content-type"], "prefer": "respond-async"}
    for _ in range(150):
        changed = bytearray(raw[: rng.randrange(len(raw))] if rng.random() < 0.5 else raw)
        for _ in range(rng.randrange(3) if changed else 0):
            changed[rng.randrange(len(changed))] = rng.choice(b'\r\n-";=[]\0\xff')
        answer = http.post(EDITS, content=bytes(changed), headers=headers)
        if answer.status_code != 202:
            assert 400 <= refusal(answer)[0] < 500, bytes(changed)
