"""Batches whose input lies in a bucket and whose files are written to one, on a real S3 server: only where the operator
lets their tenant, and whatever becomes of the bucket meanwhile.
"""

import json
import signal
from contextlib import ExitStack

import openai
import pytest
from fleet import until
from live_api import running_api
from live_batches import RunnerProcess, jsonl, line, read_lines, running_batches, wait_for_end
from swift_s3 import BUCKET, SwiftServer

from inferfleet.tasks import files
from inferfleet.tasks.errors import SettingsError
from inferfleet.tasks.files import PART_BYTES, Part
from inferfleet.tasks.s3_url import BadS3Url, parse_object, parse_prefix
from inferfleet.tasks.settings import S3Settings, load_settings
from inferfleet.tasks.stores import RedisStore
from inferfleet.tasks.stores.s3_store import make_client
from inferfleet.workers.keys import digest, new_key

CHAT = "/v1/chat/completions"
OURS = f"s3://{BUCKET}/team"


#: Whether the fleet's own files lie in Redis or in a bucket is all the same to the tenants' buckets.
@pytest.fixture(scope="module", params=["redis", "swift", pytest.param("radosgw", marks=pytest.mark.slow)])
def where(request):
    return request.param


@pytest.fixture(scope="module")
def server(where, request):
    """The S3 server of the tenants' buckets."""
    return request.getfixturevalue("session_radosgw" if where == "radosgw" else "session_swift")


@pytest.fixture(scope="module")
def shared_api(where, server, session_redis):
    kept = server.settings("fleet")
    kept = {"s3": kept["s3"]} if where == "redis" else kept
    with (
        running_api(session_redis.url, batch_buckets={"default": [OURS, "s3://no-such-bucket"]}, **kept) as api,
        running_batches(api.settings, api.worker.ring),
    ):
        yield api


@pytest.fixture
def bucket(server):
    return make_client(S3Settings(**server.settings("")["s3"]))


def create(api, place, **more):
    body = {"input_file_id": place, "endpoint": CHAT, "completion_window": "24h", **more}
    client = api.sdk()
    extra = {name: body.pop(name) for name in ("output_url_prefix",) if name in body}
    return client.batches.create(**body, extra_body=extra)


def long_line(custom_id):
    entry = line(custom_id, f"say answer of {custom_id}")
    entry["body"]["messages"].insert(0, {"role": "system", "content": "s" * 30_000})
    return entry


def read(bucket, url):
    place = parse_object(url)
    raw = bucket.get_object(Bucket=place.bucket, Key=place.key)["Body"].read()
    return raw, [json.loads(each) for each in raw.splitlines()]


def test_a_batch_reads_its_input_from_a_bucket_and_writes_its_files_to_one(api, bucket):
    # given an object of more than one part
    lines = [long_line(f"n-{number}") for number in range(150)]
    lines.append(line("bad", "fail engine_error"))
    assert len(jsonl(lines)) > PART_BYTES
    bucket.put_object(Bucket=BUCKET, Key="team/in put.jsonl", Body=jsonl(lines))
    # when
    made = create(api, f"{OURS}/in put.jsonl", output_url_prefix=f"{OURS}/out")
    assert made.input_file_id.startswith("file-")
    batch = wait_for_end(api.sdk(), made.id)
    # then
    assert batch.request_counts.model_dump() == {"total": 151, "completed": 150, "failed": 1}
    facts = batch.x_fleet
    assert (facts["input_url"], facts["output_problem"]) == (f"{OURS}/in put.jsonl", None)
    assert facts["output_url"] == f"{OURS}/out/{batch.id}_output.jsonl"
    assert facts["error_url"] == f"{OURS}/out/{batch.id}_error.jsonl"
    for url, file_id, count in (
        (facts["output_url"], batch.output_file_id, 150), (facts["error_url"], batch.error_file_id, 1)
    ):  # fmt: skip
        raw, entries = read(bucket, url)
        assert (raw, len(entries)) == (api.sdk().files.content(file_id).read(), count)
    # and the input is a file like every other
    info = api.sdk().files.retrieve(batch.input_file_id)
    assert (info.filename, info.bytes) == ("in put.jsonl", len(jsonl(lines)))
    assert api.sdk().files.content(info.id).read() == jsonl(lines)
    # and a retry reads that one, and writes files of its own
    with api.http() as http:
        again = http.post(f"/v1/batches/{batch.id}/retry", json={}).json()
    again = wait_for_end(api.sdk(), again["id"])
    assert again.request_counts.total == 1
    assert read(bucket, again.x_fleet["error_url"])[1][0]["custom_id"] == "bad"


@pytest.mark.parametrize(
    ("change", "code", "param"),
    [
        ({"place": "s3://strangers/in.jsonl"}, "url_not_allowed", "input_file_id"),
        ({"place": f"s3://{BUCKET}/other/in.jsonl"}, "url_not_allowed", "input_file_id"),
        ({"place": f"s3://{BUCKET}/teams/in.jsonl"}, "url_not_allowed", "input_file_id"),
        ({"place": f"{OURS}/../other/in.jsonl"}, "invalid_request", "input_file_id"),
        ({"place": f"{OURS}//in.jsonl"}, "invalid_request", "input_file_id"),
        ({"place": f"{OURS}/"}, "invalid_request", "input_file_id"),
        ({"place": "s3://"}, "invalid_request", "input_file_id"),
        ({"place": "https://host/in.jsonl"}, "invalid_request", "input_file_id"),
        ({"place": f"{OURS}/{'k' * 950}"}, "invalid_request", "input_file_id"),
        ({"output_url_prefix": "s3://strangers/"}, "url_not_allowed", "output_url_prefix"),
        ({"output_url_prefix": f"s3://{BUCKET}"}, "url_not_allowed", "output_url_prefix"),
        ({"output_url_prefix": f"{OURS}/./x"}, "invalid_request", "output_url_prefix"),
        ({"output_url_prefix": "/tmp"}, "invalid_request", "output_url_prefix"),
    ],
)
def test_a_place_that_is_none_or_not_the_tenants_is_refused(api, change, code, param):
    with pytest.raises(openai.UnprocessableEntityError) as caught:
        create(api, **{"place": f"{OURS}/in.jsonl"} | change)
    assert (caught.value.code, caught.value.param) == (code, param)


def test_a_tenant_without_buckets_may_use_none(api):
    key = new_key()
    api.worker.ledger.put_key(digest(key), "other", "")
    with api.http(headers={"authorization": f"Bearer {key}"}) as http:
        body = {"input_file_id": f"{OURS}/in.jsonl", "endpoint": CHAT, "completion_window": "24h"}
        answer = http.post("/v1/batches", json=body)
    api.worker.ledger.redis.delete(*api.worker.ledger.redis.keys(f"{api.worker.ledger.prefix}*key*"))
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "url_not_allowed")


@pytest.mark.parametrize(
    ("key", "code"),
    [(f"{OURS}/never.jsonl", "input_not_found"), (f"{OURS}/large.jsonl", "input_too_large"),
     (f"{OURS}/empty.jsonl", "empty_file")],
)  # fmt: skip
def test_an_input_that_cannot_be_had_fails_the_batch(shared_api, bucket, key, code):
    bucket.put_object(Bucket=BUCKET, Key="team/empty.jsonl", Body=b"")
    bucket.put_object(Bucket=BUCKET, Key="team/large.jsonl", Body=b"x" * 100)
    small = {"max_file_bytes": 50} if code == "input_too_large" else {}
    with running_api(shared_api.settings.redis_url, batch_buckets=shared_api.settings.batch_buckets,
                     s3=shared_api.settings.s3, **small) as api:  # fmt: skip
        made = create(api, key)
        with running_batches(api.settings, api.worker.ring):
            batch = wait_for_end(api.sdk(), made.id)
        assert (batch.status, batch.errors.data[0].code) == ("failed", code)
        if code != "empty_file":
            assert batch.errors.data[0].param == "input_file_id"
            with pytest.raises(openai.NotFoundError):
                api.sdk().files.retrieve(batch.input_file_id)


def test_a_bucket_that_takes_no_files_keeps_no_batch_from_ending(api, bucket):
    bucket.put_object(Bucket=BUCKET, Key="team/in.jsonl", Body=jsonl([line("a")]))
    made = create(api, f"{OURS}/in.jsonl", output_url_prefix="s3://no-such-bucket/x")
    batch = wait_for_end(api.sdk(), made.id)
    assert (batch.status, batch.x_fleet["output_url"]) == ("completed", None)
    assert "refuses" in batch.x_fleet["output_problem"]
    assert [entry["custom_id"] for entry in read_lines(api.sdk(), batch.output_file_id)] == ["a"]


def test_a_bucket_that_is_away_is_waited_for_and_a_cancelled_batch_does_not_wait(
    session_redis, session_swift, tmp_path
):
    # given a server that stands still
    with SwiftServer(session_swift.python, tmp_path / "swift") as swift:
        s3 = swift.settings("", deadline_seconds=1, read_timeout_seconds=1)["s3"]
        client = make_client(S3Settings(**s3))
        client.put_object(Bucket=BUCKET, Key="team/in.jsonl", Body=jsonl([line("a")]))
        with (
            running_api(session_redis.url, batch_buckets={"default": [OURS]}, s3=s3) as api,
            running_batches(api.settings, api.worker.ring),
        ):
            swift.signal("object", signal.SIGSTOP)
            waits = create(api, f"{OURS}/in.jsonl", output_url_prefix=f"{OURS}/out/")
            leaves = create(api, f"{OURS}/in.jsonl")
            # when one batch is cancelled, and the server goes on
            api.sdk().batches.cancel(leaves.id)
            assert wait_for_end(api.sdk(), leaves.id).status == "cancelled"
            assert api.sdk().batches.retrieve(waits.id).status == "validating"
            swift.signal("object", signal.SIGCONT)
            # then the other runs
            batch = wait_for_end(api.sdk(), waits.id)
            assert (batch.status, batch.x_fleet["output_problem"]) == ("completed", None)
            assert len(read(client, batch.x_fleet["output_url"])[1]) == 1


def held_lines(api, batch_id):
    """Whether all lines of the batch wait for a worker."""
    return len(api.worker.ledger.list("default", metadata={"batch_id": batch_id}).jobs) == 2


@pytest.mark.slow
def test_a_runner_that_is_killed_while_it_copies_is_followed_by_another(session_redis, session_swift, tmp_path):
    with SwiftServer(session_swift.python, tmp_path / "swift") as swift:
        s3 = swift.settings("", deadline_seconds=1, read_timeout_seconds=1)["s3"]
        client = make_client(S3Settings(**s3))
        client.put_object(Bucket=BUCKET, Key="team/in.jsonl", Body=jsonl([line("a"), line("b", "hold on")]))
        buckets = {"default": [OURS]}
        places = {"s3": json.dumps(s3), "batch_buckets": json.dumps(buckets)}

        with running_api(session_redis.url, batch_buckets=buckets, s3=s3) as api, ExitStack() as stack:

            def runner():
                started = RunnerProcess(api.settings, tmp_path, lease_seconds=1, heartbeat_seconds=0.3, **places)
                stack.callback(started.kill)
                return started

            # given one that waits for its input
            swift.signal("object", signal.SIGSTOP)
            made = create(api, f"{OURS}/in.jsonl", output_url_prefix=f"{OURS}/out/")
            first = runner()
            until(lambda: b"store_unavailable" in first.log.read_bytes())
            first.kill()
            swift.signal("object", signal.SIGCONT)
            # then another has it run, and is killed while it writes the files
            second = runner()
            until(lambda: held_lines(api, made.id))
            api.worker.ring("paper", 1)  # runners of their own ring for real workers
            until(lambda: api.sdk().batches.retrieve(made.id).request_counts.completed == 1)
            swift.signal("object", signal.SIGSTOP)
            api.sdk().batches.cancel(made.id)
            until(lambda: b"store_unavailable" in second.log.read_bytes())
            second.kill()
            swift.signal("object", signal.SIGCONT)
            runner()
            batch = wait_for_end(api.sdk(), made.id)
        assert (batch.status, batch.request_counts.failed) == ("cancelled", 1)
        kinds = {kind: [entry["custom_id"] for entry in read(client, batch.x_fleet[f"{kind}_url"])[1]]
                 for kind in ("output", "error")}  # fmt: skip
        assert kinds == {"output": ["a"], "error": ["b"]}


def test_an_object_that_is_exchanged_while_it_is_read_fails_the_batch(api, bucket, monkeypatch):
    from inferfleet.tasks.stores import Bucket

    # given a bucket whose object changes behind the first piece
    big = jsonl([long_line(f"n-{number}") for number in range(300)])
    bucket.put_object(Bucket=BUCKET, Key="team/changes.jsonl", Body=big)
    read_before = Bucket.read

    def read_and_change(self, url, etag, start, size):
        data = read_before(self, url, etag, start, size)
        bucket.put_object(Bucket=BUCKET, Key="team/changes.jsonl", Body=big.replace(b"say", b"sag"))
        return data

    monkeypatch.setattr(Bucket, "read", read_and_change)
    batch = wait_for_end(api.sdk(), create(api, f"{OURS}/changes.jsonl").id)
    assert (batch.status, batch.errors.data[0].code) == ("failed", "input_changed")


# Settings and urls ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("store", "prefix"),
    [
        ("s3://b/fleet", "s3://b"),
        ("s3://b", "s3://b/team"),
        ("s3://b/fleet", "s3://b/fleet/x"),
        ("s3://b/x/", "s3://b/x"),
    ],
)
def test_no_tenant_may_be_given_the_place_of_everybodys_files(store, prefix):
    with pytest.raises(SettingsError) as caught:
        load_settings({"result_store": store.replace("//b", "//bucket"),
                       "batch_buckets": {"a": [prefix.replace("//b", "//bucket")]}})  # fmt: skip
    assert caught.value.param == "batch_buckets.a"


def test_a_place_that_is_no_url_of_s3_stops_the_start():
    with pytest.raises(SettingsError) as caught:
        load_settings({"batch_buckets": {"a": ["bucket/x"]}})
    assert caught.value.param == "batch_buckets.a.0"
    given = load_settings({"batch_buckets": {"a": ["s3://bucket", "s3://bucket/x"]}, "result_store": "s3://other"})
    assert given.batch_buckets == {"a": ["s3://bucket/", "s3://bucket/x/"]}


@pytest.mark.parametrize("text", ["s3://B/k", "s3://bucket", "s3://bucket/a/../b", "s3://bucket/./b", "s3://bucket//b",
                                  "s3://bucket/a\nb", "s3:/bucket/k", "s3://bucket/"])  # fmt: skip
def test_a_text_that_is_no_object_is_refused(text):
    with pytest.raises(BadS3Url):
        parse_object(text)


def test_a_prefix_ends_with_a_slash():
    for text in ("s3://bucket", "s3://bucket/"):
        assert (str(parse_prefix(text)), parse_prefix(text).key) == ("s3://bucket/", "")
    assert str(parse_prefix("s3://bucket/a/b")) == "s3://bucket/a/b/"


def test_a_part_that_is_copied_again_takes_the_place_of_the_first(ledger):
    # given a copy that broke off behind its first part
    store, file_id = RedisStore(ledger, 60), files.new_file_id()
    ledger.run(files.open_file(file_id, "default", "in.jsonl", "batch"))
    for fence in (1, 2):
        stored = store.put(files.part_key(file_id, fence, 0), b"x", "x")
        part = Part(stored.key, stored.size_bytes, stored.sha256)
        ledger.run(files.add_part(file_id, 0, part, in_ledger=True))
    # when another runner has copied it again
    [left] = ledger.redis.keys(f"{ledger.prefix}output:*")
    # then only its own is left, and stays
    assert left.decode().endswith("_2_0")
    assert ledger.redis.pttl(left) == -1
