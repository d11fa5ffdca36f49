"""Image jobs from the queue to the store and back: real workers, a real Redis, scripted engines. And what dies on the
way: whatever it is, a job that completes shows the pictures of its seed, and nothing else is left in the store.
"""

import base64
import hashlib
import io
import json
import os
import signal
import time

import pytest
from fake_pictures import picture
from fleet import Fleet, until
from PIL import Image

from inferfleet.tasks import names
from inferfleet.tasks.contracts import data_url
from inferfleet.tasks.names import is_terminal_event
from inferfleet.tasks.stores import RedisStore
from inferfleet.workers.flight import seed_of

IMAGE = {"p": "image"}
BOTH = {"m": "fake", "p": "image"}


def files(fleet):
    """Keys of all files in the store."""
    prefix = fleet.ledger.prefix + "output:"
    return {key.decode().removeprefix(prefix) for key in fleet.ledger.redis.scan_iter(prefix + "*")}


def pictures_of(fleet, record):
    """The job's pictures, as the store gives them against the digests in its record."""
    store = RedisStore(fleet.ledger, 60)
    return [store.get(output["id"], output["hash"].removeprefix("sha256:")) for output in record.outputs]


def assert_painted(fleet, record, n=1, seed=None, **changes):
    """The job completed with exactly the pictures of its seed, told of in its log and its answer."""
    assert record.state == "completed", record.error
    seed = seed_of(record.id) if seed is None else seed
    assert pictures_of(fleet, record) == [picture(seed + index, **changes) for index in range(n)]
    assert {output["id"] for output in record.outputs} <= files(fleet)
    answer = json.loads(record.response)
    assert answer["data"] == [{"index": index, "seed": seed + index} for index in range(n)]
    events = fleet.ledger.events(record.id)
    assert [is_terminal_event(event["type"]) for event in events].index(True) == len(events) - 1
    assert events[-1]["outputs"] == record.outputs
    told = [event for event in events if event["type"] == names.OUTPUT]
    assert [{k: v for k, v in event.items() if k not in ("type", "sequence_number")} for event in told][-n:] == (
        record.outputs
    )


def test_pictures_are_stored_described_and_answered(fleet):
    fleet.start_worker(IMAGE)
    body = {"n": 3, "seed": 11, "size": "48x32", "response_format": "b64_json", "num_inference_steps": 2}
    record = fleet.wait(fleet.paint("a red circle", body=body))
    assert_painted(fleet, record, n=3, seed=11, width=48, height=32)
    assert files(fleet) == {names.output_id(record.id, record.fence, index) for index in range(3)}
    answer = json.loads(record.response)
    usage = {"input_tokens": 3, "output_tokens": 48, "total_tokens": 51,
             "input_tokens_details": {"text_tokens": 3, "image_tokens": 0}}  # fmt: skip
    assert answer == {
        "created": record.created_ms // 1000, "data": answer["data"], "size": "48x32", "output_format": "png",
        "response_format": "b64_json", "model": "p", "licence": "apache-2.0", "usage": usage,
    }  # fmt: skip
    assert (record.usage, record.endpoint, record.progress) == (usage, names.IMAGES_URL, {"step": 6, "steps": 6})


def test_progress_and_previews_are_told_while_it_runs_and_the_record_knows_how_far_it_is(fleet):
    fleet.start_worker(IMAGE)
    job_id = fleet.paint("step=0.2", body={"preview_every": 2, "num_inference_steps": 6})
    until(lambda: (fleet.ledger.get(job_id).progress or {}).get("step", 0) >= 2)
    job = fleet.client().get(job_id)
    assert (job.status, job.progress_detail.steps) == ("in_progress", 6)
    assert 33 <= job.progress < 100
    record = fleet.wait(job_id)
    assert_painted(fleet, record)
    events = fleet.ledger.events(job_id)
    assert [event["step"] for event in events if event["type"] == names.PROGRESS] == [1, 2, 3, 4, 5, 6]
    previews = [event for event in events if event["type"] == names.PREVIEW]
    assert [(event["index"], event["step"]) for event in previews] == [(0, 2), (0, 4), (0, 6)]
    assert base64.b64decode(previews[-1]["b64_json"]) == b"preview 6"


def png(colour, size):
    out = io.BytesIO()
    Image.new("RGB", size, colour).save(out, "PNG", compress_level=1)
    return out.getvalue()


def test_an_edit_gives_the_engine_its_picture_at_the_size_of_the_new_one(fleet):
    fleet.start_worker(IMAGE)
    body = {"image": data_url(png("red", (90, 30)), "image/png"), "seed": 4}
    record = fleet.wait(fleet.paint("blue", url=names.EDITS_URL, body=body))
    # The model's default size, for none was asked: what the engine got is a PNG of it.
    assert_painted(fleet, record, seed=4, init_image=png("red", (64, 64)))


def test_a_picture_that_cannot_be_decoded_fails_its_job_alone_and_the_worker_goes_on(fleet):
    worker = fleet.start_worker(IMAGE)
    whole = png("red", (300, 300))
    cut = data_url(whole[: len(whole) // 2], "image/png")
    failed = fleet.wait(fleet.paint("x", url=names.EDITS_URL, body={"image": cut}))
    assert (failed.state, failed.error["code"], failed.error["param"]) == ("failed", "invalid_request", "image")
    assert failed.deaths == 0
    assert_painted(fleet, fleet.wait(fleet.paint("x")))
    assert worker.alive and not worker.lines("engine_died")


@pytest.mark.parametrize(
    ("body", "param"),
    [({"num_inference_steps": 5, "loras": [{"name": "oil"}]}, "loras"), ({"width": 2048, "height": 1024}, "width")],
)
def test_a_job_beyond_its_model_that_was_accepted_before_anybody_knew_fails_with_the_limit(fleet, body, param):
    fleet.start_worker(IMAGE)
    record = fleet.wait(fleet.paint("x", body=body))
    assert (record.state, record.error["code"], record.error["param"]) == ("failed", "invalid_request", param)


def test_a_chat_for_an_image_model_and_the_reverse_fail_with_the_right_url(fleet):
    fleet.start_worker(BOTH)
    chat, image = fleet.wait(fleet.submit("hi", model="p")), fleet.wait(fleet.paint("x", model="m"))
    assert "/v1/images/generations" in chat.error["message"]
    assert "/v1/chat/completions" in image.error["message"]


def test_an_engine_that_makes_too_few_pictures_fails_the_job_and_leaves_none(fleet):
    fleet.start_worker(IMAGE)
    record = fleet.wait(fleet.paint("lazy", body={"n": 3}))
    assert (record.state, record.error["code"], record.outputs) == ("failed", "engine_error", None)
    assert "2 pictures of 3" in record.error["message"]
    assert files(fleet) == set()


def test_pictures_that_are_too_large_together_fail_the_job_and_leave_none(fleet):
    fleet.start_worker(IMAGE, max_result_bytes=1 << 20)
    record = fleet.wait(fleet.paint(f"bytes={600_000}", body={"n": 4}))
    assert (record.state, record.error["code"]) == ("failed", "result_too_large")
    assert_painted(fleet, fleet.wait(fleet.paint("x")))
    until(lambda: len(files(fleet)) == 1)


def test_a_cancel_between_steps_ends_the_job_and_leaves_no_picture(fleet):
    fleet.start_worker(IMAGE)
    job_id = fleet.paint("step=0.05", body={"num_inference_steps": 100, "n": 2})
    until(lambda: (fleet.ledger.get(job_id).progress or {}).get("step", 0) >= 4)
    started = time.monotonic()
    fleet.ledger.cancel(job_id)
    record = fleet.wait(job_id)
    assert time.monotonic() - started < 3
    assert (record.state, record.outputs, record.response) == ("cancelled", None, None)
    assert record.usage["input_tokens"] == 1
    assert files(fleet) == set()
    assert_painted(fleet, fleet.wait(fleet.paint("x")))


def test_expiry_and_deletion_take_the_pictures_along(fleet):
    fleet.start_worker(IMAGE, result_ttl_seconds=1)
    record = fleet.wait(fleet.paint("x"))
    assert record.state == "completed"
    until(lambda: files(fleet) == set(), seconds=20)


# What dies -----------------------------------------------------------------------------------------------------------


def test_an_engine_killed_in_the_middle_is_replaced_and_paints_the_same_picture(fleet):
    worker = fleet.start_worker(IMAGE, lease_seconds=600)
    job_id = fleet.paint("step=0.1", body={"num_inference_steps": 10, "n": 2})
    until(lambda: (fleet.ledger.get(job_id).progress or {}).get("step", 0) >= 6)
    worker.engines()[0].kill()
    record = fleet.wait(job_id)
    assert (record.deaths, record.attempts) == (1, 2)
    assert_painted(fleet, record, n=2)
    # A new attempt starts over.
    steps = [event["step"] for event in fleet.ledger.events(job_id) if event["type"] == names.PROGRESS]
    assert steps[0] == 2 and steps.count(20) == 1 and steps.count(2) == 2


def test_an_engine_that_dies_after_its_first_picture_leaves_nothing_of_that_attempt(fleet, tmp_path):
    fleet.start_worker(IMAGE)
    record = fleet.wait(fleet.paint(f"last_words={tmp_path}/said", body={"n": 2}))
    assert record.deaths == 1
    assert_painted(fleet, record, n=2)
    until(lambda: files(fleet) == {output["id"] for output in record.outputs})


@pytest.mark.slow
def test_only_the_culprit_of_a_crashed_batch_of_pictures_collects_deaths(fleet):
    fleet.start_worker(IMAGE)
    innocent = [fleet.paint("step=0.05", body={"num_inference_steps": 20}) for _ in range(3)]
    for job_id in innocent:
        until(lambda job_id=job_id: fleet.ledger.get(job_id).progress)
    culprit = fleet.wait(fleet.paint("exit=2"))
    assert (culprit.state, culprit.error["code"], culprit.deaths) == ("failed", "worker_lost", 3)
    for job_id in innocent:
        record = fleet.wait(job_id)
        assert record.deaths == 0
        assert_painted(fleet, record)


def test_a_killed_worker_s_job_is_painted_anew_by_another(fleet):
    first = fleet.start_worker(IMAGE)
    job_id = fleet.paint("step=0.1", body={"num_inference_steps": 12})
    until(lambda: fleet.ledger.get(job_id).progress)
    first.kill()
    fleet.start_worker(IMAGE)
    record = fleet.wait(job_id)
    assert (record.deaths, record.attempts) == (1, 2)
    assert_painted(fleet, record)


def test_a_stopped_worker_that_comes_back_shows_no_picture_of_its_own(fleet):
    sleeper = fleet.start_worker(IMAGE)
    job_id = fleet.paint("step=0.15", body={"num_inference_steps": 10, "n": 2})
    until(lambda: fleet.ledger.get(job_id).progress)
    sleeper.signal(signal.SIGSTOP)
    fleet.start_worker(IMAGE)
    until(lambda: fleet.ledger.get(job_id).attempts == 2)
    sleeper.signal(signal.SIGCONT)
    record = fleet.wait(job_id)
    assert record.deaths == 1
    assert_painted(fleet, record, n=2)
    until(lambda: files(fleet) == {output["id"] for output in record.outputs})


def test_a_redis_without_room_holds_pictures_up_and_loses_none(own_redis, tmp_path):
    fleet = Fleet(own_redis.url, tmp_path)
    try:
        worker = fleet.start_worker(IMAGE, lease_seconds=3, heartbeat_seconds=1)
        job_id = fleet.paint("step=0.1 bytes=100000", body={"num_inference_steps": 5, "n": 2})
        until(lambda: fleet.ledger.get(job_id).progress)
        fleet.ledger.redis.config_set("maxmemory", 1)
        until(lambda: worker.lines("store_waits"))
        time.sleep(1.0)
        fleet.ledger.redis.config_set("maxmemory", 0)
        record = fleet.wait(job_id)
        assert record.deaths == 0
        assert_painted(fleet, record, n=2, size=100_000)
        assert worker.alive
    finally:
        fleet.close()


@pytest.mark.slow
def test_lost_replies_on_every_path_store_every_picture_once(fleet, proxy):
    fleet.start_worker(IMAGE, redis_url=proxy.url)
    proxy.faults.lose_chance = 0.08
    jobs = [fleet.paint("step=0.02", body={"n": 2}) for _ in range(15)]
    records = [fleet.wait(job_id) for job_id in jobs]
    proxy.faults.lose_chance = 0.0
    for record in records:
        assert_painted(fleet, record, n=2)
    assert proxy.lost > 2
    until(lambda: files(fleet) == {output["id"] for record in records for output in record.outputs})


# Sharing a worker ----------------------------------------------------------------------------------------------------


def test_a_long_queue_of_pictures_keeps_no_chat_waiting(fleet):
    fleet.start_worker(BOTH, slots=32)
    queued = [fleet.paint("step=0.1", body={"num_inference_steps": 20}) for _ in range(200)]
    until(lambda: fleet.ledger.stats()["p"]["running"] == 16)
    chats = [fleet.submit("tokens=4") for _ in range(16)]
    assert {fleet.wait(job_id).state for job_id in chats} == {"completed"}
    # The pictures would take fifty seconds. No more of them are carried than the engine can soon use.
    assert fleet.ledger.stats()["p"]["running"] <= 16
    assert fleet.ledger.stats()["p"]["waiting"] > 100
    assert fleet.state(queued[-1]) == "queued"


def test_a_long_queue_of_chats_keeps_no_picture_waiting(fleet):
    fleet.start_worker({"m": {"path": "fake", "max_num_seqs": 8}, "p": "image"}, slots=16)
    chats = [fleet.submit("tokens=1000 step=0.05") for _ in range(100)]
    until(lambda: fleet.ledger.stats()["m"]["running"] >= 8)
    for record in [fleet.wait(fleet.paint("x")) for _ in range(3)]:
        assert_painted(fleet, record)
    # The chats would take ten minutes, and none of them has ended.
    assert {fleet.state(job_id) for job_id in chats} == {"in_progress", "queued"}
    assert fleet.ledger.stats()["m"]["running"] == 8


def test_jobs_follow_each_other_without_waiting_for_turns_when_all_seats_are_taken(fleet):
    fleet.start_worker({"p": {"path": "image", "image": {"max_batch_size": 1}}}, slots=32, sweep_seconds=600)
    started = time.monotonic()
    jobs = [fleet.paint("step=0.01") for _ in range(40)]
    for job_id in jobs:
        assert_painted(fleet, fleet.wait(job_id))
    assert time.monotonic() - started < 20


def test_an_image_engine_on_a_cpu_runs_at_lower_priority_than_the_chats(fleet):
    worker = fleet.start_worker({"m": {"path": "fake", "device": "cpu"}, "p": {"path": "image", "device": "cpu"}})
    niceness = sorted(engine.nice() - os.getpriority(os.PRIO_PROCESS, worker.pid) for engine in worker.engines())
    assert niceness == [0, 5]


def test_a_picture_s_digest_in_the_record_is_that_of_its_bytes(fleet):
    fleet.start_worker(IMAGE)
    output = fleet.wait(fleet.paint("x", body={"seed": 1})).outputs[0]
    assert output["hash"] == "sha256:" + hashlib.sha256(picture(1)).hexdigest()
    assert (output["size_bytes"], output["content_type"]) == (len(picture(1)), "image/png")
