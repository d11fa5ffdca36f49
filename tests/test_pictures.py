"""The whole way of a picture with our own engine on a small random pipeline: SDK, API, ledger, worker, engine, file."""

import base64
import hashlib
import io
import json
from collections.abc import Iterator

import httpx2
import pytest
import redis
from fleet import Fleet, until
from live_api import LiveApi, api_of_workers
from PIL import Image
from small_pipeline import Shape, write

from inferfleet.tasks import names

#: A step may take long on a busy machine, and no lease shall lapse meanwhile.
CALM = {"lease_seconds": 60, "heartbeat_seconds": 1, "stall_seconds": 600}
LOAD_SECONDS = 240
SMALL = {"dtype": "float32", "device": "cpu", "threads": 1}


@pytest.fixture(scope="module")
def fleet(session_redis, tmp_path_factory) -> Iterator[Fleet]:
    folder = tmp_path_factory.mktemp("pictures")
    write(folder / "tiny", 1, shape=Shape(), licence="apache-2.0")
    with redis.Redis(port=session_redis.port) as client:
        client.flushall()
    fleet = Fleet(session_redis.url, folder)
    try:
        models = {"tiny": {"path": str(folder / "tiny"), **SMALL}}
        worker = fleet.start_worker(models=models, real=True, wait=False, **CALM)
        until(lambda: worker.lines("engine_ready"), LOAD_SECONDS)
        yield fleet
    finally:
        fleet.close()


@pytest.fixture(scope="module")
def api(session_redis, fleet) -> Iterator[LiveApi]:
    with api_of_workers(session_redis.url, "test") as api:
        yield api


@pytest.fixture
def http(api: LiveApi) -> Iterator[httpx2.Client]:
    with api.http() as http:
        yield http


def pixels(data: bytes) -> bytes:
    with Image.open(io.BytesIO(data)) as picture:
        return picture.convert("RGB").tobytes()


def fetched(url: str) -> bytes:
    answer = httpx2.get(url, trust_env=False)
    assert answer.status_code == 200
    return answer.content


def painting(http: httpx2.Client, **fields) -> str:
    """The id of a picture's job that has begun to paint."""
    body = {"model": "tiny", "prompt": "a red circle", "num_inference_steps": 100, **fields}
    job_id = http.post("/v1/jobs", json={"url": names.IMAGES_URL, "body": body}).json()["id"]
    until(lambda: (http.get(f"/v1/jobs/{job_id}").json()["progress_detail"] or {}).get("step", 0) >= 3)
    return job_id


def test_the_sdk_gets_the_same_pictures_as_urls_and_in_base64(api):
    asked = {"model": "tiny", "prompt": "a red circle", "n": 2, "size": "64x32"}
    urls = api.sdk().images.generate(**asked, extra_body={"seed": 5, "num_inference_steps": 2})
    whole = api.sdk().images.generate(
        **asked, response_format="b64_json", extra_body={"seed": 5, "num_inference_steps": 2}
    )
    alone = api.sdk().images.generate(
        **asked | {"n": 1}, response_format="b64_json", extra_body={"seed": 6, "num_inference_steps": 2}
    )

    first, second = (base64.b64decode(picture.b64_json) for picture in whole.data)
    assert [pixels(fetched(picture.url)) for picture in urls.data] == [pixels(first), pixels(second)]
    assert pixels(base64.b64decode(alone.data[0].b64_json)) == pixels(second) != pixels(first)
    assert [picture.seed for picture in urls.data] == [5, 6]
    assert (urls.size, urls.output_format, urls.usage.output_tokens > 0) == ("64x32", "png", True)
    with Image.open(io.BytesIO(first)) as picture:
        assert (picture.format, picture.size) == ("PNG", (64, 32))
        assert hashlib.sha256(b"a red circle").hexdigest() in json.dumps(picture.info, default=str)
        assert "a red circle" not in json.dumps(picture.info, default=str)


def test_the_sdk_edits_a_picture_less_or_more(api):
    start = io.BytesIO()
    Image.new("RGB", (80, 40), (250, 20, 20)).save(start, format="jpeg")
    edited = {}
    for strength in (0.1, 1.0):
        done = api.sdk().images.edit(
            model="tiny", image=("start.jpg", start.getvalue()), prompt="warmer", size="64x64",
            response_format="b64_json", extra_body={"strength": strength, "seed": 1, "num_inference_steps": 10},
        )  # fmt: skip
        edited[strength] = pixels(base64.b64decode(done.data[0].b64_json))

    assert [len(picture) for picture in edited.values()] == [64 * 64 * 3] * 2
    assert edited[0.1] != edited[1.0]


def test_a_job_tells_its_steps_its_previews_and_its_picture(http):
    job_id = painting(http, num_inference_steps=12, preview_every=4, output_format="webp", embed_prompt=True)
    with http.stream("GET", f"/v1/jobs/{job_id}/events") as stream:
        events = [json.loads(line[6:]) for line in stream.iter_lines() if line.startswith("data: ")]
    job = http.get(f"/v1/jobs/{job_id}").json()

    steps = [(event["step"], event["steps"]) for event in events if event["type"] == names.PROGRESS]
    assert steps == sorted(steps)
    assert steps[-1] == (12, 12)
    previews = [event for event in events if event["type"] == names.PREVIEW]
    assert previews
    with Image.open(io.BytesIO(base64.b64decode(previews[0]["b64_json"]))) as preview:
        assert max(preview.size) <= 64
    (output,) = job["outputs"]
    assert (job["status"], job["progress"], output["content_type"]) == ("completed", 100, "image/webp")
    data = fetched(output["url"])
    assert output["hash"] == f"sha256:{hashlib.sha256(data).hexdigest()}"


def test_a_job_is_cancelled_between_two_steps_and_the_worker_goes_on(http):
    job_id = painting(http, size="256x256")

    http.post(f"/v1/jobs/{job_id}/cancel")
    job = http.get(f"/v1/jobs/{job_id}", params={"wait": 30}).json()

    assert (job["status"], job["outputs"], job["response"]) == ("cancelled", [], None)
    assert job["progress_detail"]["step"] < 100
    asked = {"model": "tiny", "prompt": "x", "num_inference_steps": 1}
    assert http.post(names.IMAGES_URL, json=asked).status_code == 200


def test_a_picture_is_the_same_after_its_engine_was_killed_in_the_middle(fleet, http):
    job_id = painting(http, seed=11)
    fleet.workers[0].engines()[0].kill()
    job = until(
        lambda: (job := http.get(f"/v1/jobs/{job_id}", params={"wait": 5}).json())["completed_at"] and job,
        LOAD_SECONDS,
    )

    body = {"model": "tiny", "prompt": "a red circle", "num_inference_steps": 100, "seed": 11}
    calm = http.post(names.IMAGES_URL, json=body).json()
    assert job["attempts"] == 2
    assert pixels(fetched(job["outputs"][0]["url"])) == pixels(fetched(calm["data"][0]["url"]))


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": "many words " * 600}, "prompt"),
        ({"loras": [{"name": "unknown"}]}, "loras"),
        ({"size": "4096x4096"}, "size"),
        ({"width": 17, "height": 64}, "width"),
        ({"guidance_scale": 3.5}, "guidance_scale"),
    ],
)
def test_what_the_model_cannot_do_is_a_typed_error_and_the_worker_lives(http, fields, param):
    answer = http.post(names.IMAGES_URL, json={"model": "tiny", "prompt": "x", **fields})

    assert (answer.status_code, answer.json()["error"]["param"]) == (422, param), answer.text


def test_a_start_that_is_damaged_beyond_its_header_is_refused_by_name(http):
    noise = io.BytesIO()
    Image.effect_noise((64, 64), 90).save(noise, format="png")
    cut = noise.getvalue()[: len(noise.getvalue()) // 2]

    answer = http.post(names.EDITS_URL, data={"model": "tiny", "prompt": "x"}, files={"image": ("cut.png", cut)})

    assert (answer.status_code, answer.json()["error"]["param"]) == (422, "image"), answer.text
