"""Picture jobs and batches of them with their files in a bucket: real workers, a real S3 server and its faults."""

import base64
import itertools
import json
import time
from datetime import timedelta

import httpx2
from chaosproxy import ChaosProxy
from fake_pictures import picture
from fleet import FAST, until
from live_api import api_of_workers
from live_batches import read_lines, running_batches, start, wait_for_end
from swift_s3 import SwiftServer

from inferfleet.tasks import names
from inferfleet.tasks.settings import Settings
from inferfleet.tasks.stores import open_store
from inferfleet.workers.batches.orphans import OrphanSweep

IMAGE = {"p": "image"}


def painted(fleet, settings, job_id, seed):
    """The job's record once it has ended with the picture of its seed, read against the digest in it."""
    record = fleet.wait(job_id)
    assert record.state == "completed", record.error
    (output,) = record.outputs
    store = open_store(Settings(redis_url=fleet.redis_url, **settings), fleet.ledger)
    assert store.get(output["id"], output["hash"].removeprefix("sha256:")) == picture(seed)
    return record


def paint(fleet, seed):
    return fleet.paint("a red circle", body={"seed": seed})


def test_pictures_lie_in_the_bucket_and_not_in_redis(fleet, s3):
    fleet.start_worker(IMAGE, **s3)
    painted(fleet, s3, paint(fleet, 3), 3)
    assert fleet.ledger.redis.keys("*output:*") == []


def test_a_bucket_that_is_away_while_a_picture_is_stored_fails_no_job(fleet, session_swift, tmp_path):
    with SwiftServer(session_swift.python, tmp_path / "swift") as swift:
        settings = swift.settings("a", deadline_seconds=1)
        fleet.start_worker(IMAGE, **settings)
        swift.kill("object")
        job_id = paint(fleet, 5)
        # When that takes longer than a lease and than an engine may stand still
        until(lambda: fleet.workers[0].lines("store_waits"))
        time.sleep(2 * FAST["lease_seconds"])
        assert fleet.state(job_id) == "in_progress"
        swift.start("object")
        # Then the same run goes on, and the engine has more work done by the same worker
        assert painted(fleet, settings, job_id, 5).attempts == 1
        painted(fleet, settings, paint(fleet, 6), 6)
        assert fleet.workers[0].lines("engine_stands_still") == []


def test_a_wire_that_loses_every_third_reply_of_the_bucket_loses_no_picture(fleet, session_swift, s3):
    with ChaosProxy(session_swift.port) as proxy:
        through = {**s3, "s3": {**s3["s3"], "endpoint_url": f"http://127.0.0.1:{proxy.port}"}}
        fleet.start_worker(IMAGE, **through)
        proxy.faults.lose_chance = 0.3
        seeds = itertools.count()
        while proxy.lost < 3:
            seed = next(seeds)
            painted(fleet, s3, paint(fleet, seed), seed)


def test_files_that_nobody_names_are_deleted_and_all_others_stay(fleet, s3):
    # Given the picture of a job that is there, and of one that is gone
    fleet.start_worker(IMAGE, **s3)
    kept = painted(fleet, s3, paint(fleet, 1), 1).outputs[0]["id"]
    gone = painted(fleet, s3, paint(fleet, 2), 2)
    fleet.ledger.delete(gone.id)
    # and what a lost run, a broken upload and a stranger left
    store = open_store(Settings(redis_url=fleet.redis_url, **s3), fleet.ledger)
    lost = names.output_id(names.job_of_output(kept), 9, 0)
    upload, shelf = f"file-{'a' * 32}_0_0", f"batch_{'b' * 32}_3_7"
    for key in (lost, upload, shelf, "a-strangers-file"):
        store.put(key, b"x", "x/y")
    # When the sweep comes before their time, nothing happens
    assert OrphanSweep(fleet.ledger, store).round() == 0
    # and after it
    assert OrphanSweep(fleet.ledger, store, timedelta(seconds=-60)).round() == 4
    assert [found.key for found in store.scan()] == sorted([kept, "a-strangers-file"])


def test_a_batch_of_pictures_answers_with_urls_or_base64_that_hold_the_pictures(fleet, s3):
    fleet.start_worker(IMAGE, **s3)
    lines = [
        {"custom_id": kind, "method": "POST", "url": "/v1/images/generations",
         "body": {"model": "p", "prompt": "a cat", "seed": seed, "response_format": kind}}
        for seed, kind in enumerate(("url", "b64_json"))
    ]  # fmt: skip
    with api_of_workers(fleet.redis_url, "test", **s3) as api:
        client = api.sdk()
        with running_batches(api.settings, fleet.doorbell.ring, public_url=api.url):
            batch = wait_for_end(client, start(client, lines, "/v1/images/generations").id)
        assert batch.status == "completed"
        assert batch.usage.output_tokens > 0
        output = {entry["custom_id"]: entry["response"]["body"] for entry in read_lines(client, batch.output_file_id)}
        shown = output["url"]["data"][0]
        assert httpx2.get(shown["url"], trust_env=False).content == picture(0)
        assert shown["url_expires_at"] > time.time() + 3600
        assert base64.b64decode(output["b64_json"]["data"][0]["b64_json"]) == picture(1)
        assert "response_format" not in json.dumps(output)


def test_the_url_of_a_picture_leads_to_the_bucket_where_clients_may_go_there(fleet, s3):
    public = {**s3, "s3": {**s3["s3"], "public_links": True}}
    fleet.start_worker(IMAGE, **public)
    record = painted(fleet, s3, paint(fleet, 4), 4)
    with api_of_workers(fleet.redis_url, "test", **public) as api, api.http() as http:
        url = http.get(f"/v1/jobs/{record.id}").json()["outputs"][0]["url"]
        first = http.get(url)
        assert (first.status_code, first.headers["cache-control"]) == (307, "no-store")
        assert first.headers["location"].startswith(s3["s3"]["endpoint_url"])
        answer = httpx2.get(first.headers["location"], trust_env=False)
        assert (answer.content, answer.headers["content-type"]) == (picture(4), "image/png")
        assert answer.headers["content-disposition"].startswith("attachment; filename=")
