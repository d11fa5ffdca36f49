"""The whole way of an image job under the API with our own engine: ledger, Celery, worker, engine process, store."""

import io

import numpy as np
import pytest
import torch
from fleet import until
from PIL import Image
from small_pipeline import write

from inferfleet.engine.offline import ImageGenerator
from inferfleet.tasks import names
from inferfleet.tasks.contracts import data_url

SPEC = {"dtype": "float32", "device": "cpu", "threads": 1}
#: A step may take long on a busy machine, and no lease shall lapse meanwhile.
CALM = {"lease_seconds": 60, "heartbeat_seconds": 1, "stall_seconds": 600}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flux")
    write(folder, 1, licence="apache-2.0")
    return folder


@pytest.fixture(scope="module")
def offline(folder):
    torch.set_num_threads(1)
    return ImageGenerator(str(folder), **SPEC)


def models(folder):
    return {"p": {"path": str(folder), **SPEC}}


def pictures_of(fleet, record):
    with fleet.client() as client:
        return [Image.open(io.BytesIO(client.output(record.id, index))) for index in range(len(record.outputs))]


def assert_same(painted, expected):
    assert len(painted) == len(expected)
    for one, other in zip(painted, expected, strict=True):
        assert np.array_equal(np.asarray(one), np.asarray(other))


def test_a_fleet_paints_like_the_offline_engine_in_mixed_batches(fleet, folder, offline):
    fleet.start_worker(models(folder), real=True, **CALM)
    wanted = [
        {"prompt": f"a circle number {n}", "seed": 7 * n, "n": 1 + n % 2, "num_inference_steps": 1 + n % 4,
         "width": 64, "height": (32, 64)[n % 2]}
        for n in range(8)
    ]  # fmt: skip
    jobs = [fleet.paint(body["prompt"], body=body) for body in wanted]
    records = [fleet.wait(job_id) for job_id in jobs]
    for body, record in zip(wanted, records, strict=True):
        assert record.state == "completed", record.error
        expected = offline.generate([body["prompt"]], **{name: body[name] for name in body if name != "prompt"})
        assert_same(pictures_of(fleet, record), expected)
        steps = body["n"] * body["num_inference_steps"]
        assert record.progress == {"step": steps, "steps": steps}
        assert record.usage["output_tokens"] > 0


def test_a_picture_is_the_same_after_its_engine_was_killed_in_the_middle(fleet, folder, offline):
    worker = fleet.start_worker(models(folder), real=True, **CALM)
    job_id = fleet.paint("a red circle", body={"num_inference_steps": 100, "seed": 11, "width": 128, "height": 128})
    until(lambda: (fleet.ledger.get(job_id).progress or {}).get("step", 0) >= 5)
    worker.engines()[0].kill()
    record = fleet.wait(job_id)
    assert (record.state, record.deaths) == ("completed", 1)
    how = {"num_inference_steps": 100, "seed": 11, "width": 128, "height": 128}
    assert_same(pictures_of(fleet, record), [offline.generate("a red circle", **how)])


def test_an_edit_starts_from_its_picture_and_a_cancel_ends_between_steps(fleet, folder, offline):
    fleet.start_worker(models(folder), real=True, **CALM)
    start = Image.effect_noise((64, 64), 80).convert("RGB")
    out = io.BytesIO()
    start.save(out, "PNG")
    body = {"image": data_url(out.getvalue(), "image/png"), "strength": 0.5, "seed": 3, "num_inference_steps": 4}
    record = fleet.wait(fleet.paint("blue", url=names.EDITS_URL, body=body))
    how = {"init_image": start, "strength": 0.5, "seed": 3, "num_inference_steps": 4}
    assert_same(pictures_of(fleet, record), [offline.generate("blue", **how)])

    long = fleet.paint("blue", body={"num_inference_steps": 100, "n": 4, "width": 128, "height": 128})
    until(lambda: (fleet.ledger.get(long).progress or {}).get("step", 0) >= 4)
    fleet.ledger.cancel(long)
    record = fleet.wait(long)
    assert (record.state, record.outputs) == ("cancelled", None)
    assert record.progress["step"] < 400


def test_a_prompt_that_is_too_long_fails_its_job_with_the_limit(fleet, folder):
    fleet.start_worker(models(folder), real=True, **CALM)
    record = fleet.wait(fleet.paint("circle " * 900, body={"num_inference_steps": 1}))
    assert (record.state, record.error["code"], record.error["param"]) == ("failed", "invalid_request", "prompt")
