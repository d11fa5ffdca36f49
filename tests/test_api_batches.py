"""/v1/batches through the OpenAI SDK, with a live API, a runner and a worker by hand: files, ends, what is refused."""

import json

import openai
import pytest
from fleet import until
from live_api import running_api
from live_batches import jsonl, line, read_lines, running_batches, start, wait_for_end

from inferfleet.tasks.ledger import Ledger
from inferfleet.workers.keys import digest, new_key

CHAT = "/v1/chat/completions"


#: On both stores; all else is the same on either.
BOTH = pytest.mark.parametrize("shared_api", ["redis", "s3"], indirect=True, scope="module")


@pytest.fixture(scope="module")
def shared_api(request, session_redis):
    store = getattr(request, "param", "redis")
    kept = request.getfixturevalue("session_swift").settings("batches") if store == "s3" else {}
    with running_api(session_redis.url, batch_window=40, **kept) as api, running_batches(api.settings, api.worker.ring):
        yield api


@pytest.fixture
def client(api):
    return api.sdk()


@pytest.fixture
def ledger(api):
    return api.worker.ledger


def ids(lines):
    return [entry["custom_id"] for entry in lines]


@BOTH
def test_a_batch_runs_its_lines_and_every_one_ends_in_one_of_two_files(client, ledger):
    # Given lines that work, one that fails in the worker and one that cannot be accepted
    lines = [line(f"good-{number}", f"say answer {number}") for number in range(20)]
    lines += [line("fails", "fail engine_error"), line("hot", temperature=3.5), line("größe", "say ja")]
    made = start(client, lines, metadata={"team": "a"})
    assert (made.object, made.status, made.endpoint, made.completion_window) == ("batch", "validating", CHAT, "24h")
    assert (made.metadata, made.expires_at - made.created_at) == ({"team": "a"}, 86400)
    # When it has ended
    batch = wait_for_end(client, made.id)
    # Then the object says so in OpenAI's words
    assert (batch.status, batch.errors, batch.model) == ("completed", None, "paper")
    assert batch.request_counts.model_dump() == {"total": 23, "completed": 21, "failed": 2}
    assert batch.created_at <= batch.in_progress_at <= batch.finalizing_at <= batch.completed_at
    assert (batch.failed_at, batch.expired_at, batch.cancelling_at, batch.cancelled_at) == (None,) * 4
    assert (batch.usage.input_tokens, batch.usage.output_tokens, batch.usage.total_tokens) == (63, 41, 104)
    # and each line stands in exactly one file
    output, errors = (read_lines(client, file_id) for file_id in (batch.output_file_id, batch.error_file_id))
    assert sorted(ids(output)) == sorted({*ids(lines)} - {"fails", "hot"})
    by_id = {entry["custom_id"]: entry for entry in output + errors}
    good = by_id["good-7"]
    assert (good["response"]["status_code"], good["error"]) == (200, None)
    assert good["response"]["request_id"].startswith("req_")
    assert good["response"]["body"]["choices"][0]["message"]["content"] == "answer 7"
    assert good["id"].startswith("batch_req_")
    assert by_id["fails"]["response"]["status_code"] == 500
    assert by_id["fails"]["response"]["body"]["error"]["code"] == "engine_error"
    hot = by_id["hot"]["response"]
    assert (hot["status_code"], hot["body"]["error"]["param"], by_id["hot"]["error"]) == (422, "body.temperature", None)
    # and the files are as other files
    info = client.files.retrieve(batch.output_file_id)
    assert (info.purpose, info.filename, info.bytes) == (
        "batch_output", f"{batch.id}_output.jsonl", len(client.files.content(info.id).read())
    )  # fmt: skip
    # and nothing of the lines' jobs is left
    assert ledger.list("default", metadata={"batch_id": batch.id}).jobs == []


def test_a_batch_without_failures_has_no_error_file(client):
    batch = wait_for_end(client, start(client, [line("a")]).id)
    assert (batch.status, batch.error_file_id) == ("completed", None)
    assert [entry["custom_id"] for entry in read_lines(client, batch.output_file_id)] == ["a"]


def test_batches_are_listed_newest_first_in_pages(client):
    made = [start(client, [line("a")]).id for _ in range(3)]
    assert [batch.id for batch in client.batches.list(limit=2)][:3] == made[::-1]
    page = client.batches.list(limit=1)
    assert (page.has_more, page.data[0].id) == (True, made[2])
    for batch_id in made:
        wait_for_end(client, batch_id)


@BOTH
def test_results_can_be_read_while_a_batch_runs_and_go_on_from_an_offset(api, client):
    lines = [line(f"quick-{number}", "say done") for number in range(6)] + [line("slow", "hold on")]
    made = start(client, lines)
    with api.http() as http:
        path = f"/v1/batches/{made.id}/results"
        first = until(lambda: (answer := http.get(path)).headers["x-last-line"] == "6" and answer)
        assert first.headers["x-incomplete"] == "true"
        assert first.headers["content-type"] == "application/x-ndjson"
        assert {json.loads(raw)["custom_id"] for raw in first.text.splitlines()} == {f"quick-{n}" for n in range(6)}
        # from an offset, up to a limit
        some = http.get(path, params={"offset": 2, "limit": 3})
        assert (some.text.splitlines(), some.headers["x-last-line"]) == (first.text.splitlines()[2:5], "5")
        assert http.get(path, params={"offset": 6}).text == ""
        # to the end
        client.batches.cancel(made.id)
        wait_for_end(client, made.id)
        rest = http.get(path, params={"offset": 6})
        assert json.loads(rest.text)["custom_id"] == "slow"
        assert (rest.headers["x-incomplete"], rest.headers["x-last-line"]) == ("false", "7")
        assert http.get(path).text.splitlines()[:6] == first.text.splitlines()


@BOTH
def test_a_cancelled_batch_keeps_what_ended_and_accounts_for_every_other_line(api, client):
    # Given a batch of which some lines ended, some run and most wait
    lines = [line(f"done-{number}") for number in range(5)]
    lines += [line(f"held-{number}", "hold on") for number in range(3)]
    lines += [line(f"rest-{number}", "say rest") for number in range(600)]
    made = start(client, lines)
    until(lambda: client.batches.retrieve(made.id).request_counts.completed >= 5)
    # When it is cancelled
    cancelled = client.batches.cancel(made.id)
    assert cancelled.status in ("cancelling", "cancelled")
    batch = wait_for_end(client, made.id)
    # Then
    assert batch.status == "cancelled"
    assert batch.cancelling_at <= batch.cancelled_at
    output, errors = (read_lines(client, file_id) for file_id in (batch.output_file_id, batch.error_file_id))
    counts = batch.request_counts
    assert (counts.total, counts.completed, counts.failed) == (608, len(output), len(errors))
    assert sorted(entry["custom_id"] for entry in output + errors) == sorted(entry["custom_id"] for entry in lines)
    for entry in errors:
        assert (entry["response"], entry["error"]["code"]) == (None, "batch_cancelled")
    assert {f"held-{number}" for number in range(3)} <= {entry["custom_id"] for entry in errors}
    # and again it answers the same
    assert client.batches.cancel(made.id).status == "cancelled"


def test_a_completed_batch_cannot_be_cancelled(client):
    batch = wait_for_end(client, start(client, [line("a")]).id)
    with pytest.raises(openai.ConflictError) as caught:
        client.batches.cancel(batch.id)
    assert caught.value.code == "batch_state"


def test_lines_that_the_window_is_too_short_for_expire_in_the_error_file(api, client, ledger):
    lines = [line(f"quick-{number}", f"say {number}") for number in range(100)]
    lines += [line(f"held-{number}", f"hold {number}") for number in range(100)]
    made = start(client, lines)
    # when all that is under way stands still
    until(lambda: len(held_jobs(ledger, made.id)) == 40)
    api.worker.paused = True
    # When the window ends
    soon = ledger.redis.time()[0] * 1000
    ledger.redis.hset(f"{ledger.prefix}batch:{made.id}", "expires_ms", soon)
    for job in held_jobs(ledger, made.id):
        ledger.redis.hset(f"{ledger.prefix}job:{job}", "deadline_ms", soon)
    until(lambda: ledger.sweep(1000, result_ttl_ms=10**9) and client.batches.retrieve(made.id).status == "expired")
    # Then
    batch = client.batches.retrieve(made.id)
    assert batch.expired_at >= batch.in_progress_at
    output, errors = (read_lines(client, file_id) for file_id in (batch.output_file_id, batch.error_file_id))
    counts = batch.request_counts
    assert (counts.total, counts.completed, counts.failed) == (200, len(output), len(errors))
    assert sorted(ids(output + errors)) == sorted(ids(lines))
    assert {f"held-{number}" for number in range(100)} <= {*ids(errors)}
    for entry in errors:
        assert entry["response"] is None
        assert entry["error"] == {
            "code": "batch_expired",
            "message": "This request could not be executed before the completion window expired.",
        }


def held_jobs(ledger, batch_id):
    """The jobs of a batch's lines that run and do not end."""
    page = ledger.list("default", status="in_progress", metadata={"batch_id": batch_id}, limit=100)
    envelopes = {job.id: ledger.redis.hget(f"{ledger.prefix}job:{job.id}", "envelope") or b"" for job in page.jobs}
    return [job_id for job_id, envelope in envelopes.items() if b'"hold ' in envelope]


def test_a_batch_whose_every_line_fails_is_completed_all_the_same(client):
    batch = wait_for_end(client, start(client, [line("a", "fail engine_error"), line("b", "fail nan_logits")]).id)
    assert (batch.status, batch.output_file_id) == ("completed", None)
    assert batch.request_counts.model_dump() == {"total": 2, "completed": 0, "failed": 2}


# Retry and repeats ---------------------------------------------------------------------------------------------------


@BOTH
def test_a_retry_runs_the_failed_lines_alone_as_a_batch_of_its_own(api, client):
    lines = [line("good"), line("bad", "fail engine_error"), line("worse", "fail nan_logits"), line("hot", top_p=5.0)]
    first = wait_for_end(client, start(client, lines, metadata={"team": "b"}).id)
    assert first.request_counts.failed == 3
    with api.http() as http:
        answer = http.post(f"/v1/batches/{first.id}/retry", json={})
        assert answer.status_code == 200
        again = wait_for_end(client, answer.json()["id"])
        assert again.request_counts.model_dump() == {"total": 3, "completed": 0, "failed": 3}
        assert (again.id != first.id, again.metadata, again.x_fleet["retry_of"]) == (True, {"team": "b"}, first.id)
        assert {entry["custom_id"] for entry in read_lines(client, again.error_file_id)} == {"bad", "worse", "hot"}
        # only some of them
        answer = http.post(f"/v1/batches/{first.id}/retry", json={"custom_ids": ["worse", "good"]})
        some = wait_for_end(client, answer.json()["id"])
        assert [entry["custom_id"] for entry in read_lines(client, some.error_file_id)] == ["worse"]
        # none of them
        answer = http.post(f"/v1/batches/{first.id}/retry", json={"custom_ids": ["good"]})
        none = wait_for_end(client, answer.json()["id"])
        assert (none.status, none.errors.data[0].code) == ("failed", "nothing_to_run")
        # of what did not fail, or has not ended
        fine = wait_for_end(client, start(client, [line("a")]).id)
        running = start(client, [line("a", "hold on")])
        for batch_id in (fine.id, running.id):
            refused = http.post(f"/v1/batches/{batch_id}/retry", json={})
            assert (refused.status_code, refused.json()["error"]["code"]) == (409, "batch_state")
    client.batches.cancel(running.id)
    wait_for_end(client, running.id)
    # and the first batch is as it was
    assert client.batches.retrieve(first.id) == first


def test_a_retry_of_the_sdk_and_a_repeated_key_make_no_second_batch(api, client):
    file = client.files.create(file=("in.jsonl", jsonl([line("a")])), purpose="batch")
    body = {"input_file_id": file.id, "endpoint": CHAT, "completion_window": "24h"}

    def create(headers, **more):
        with api.http() as http:
            return http.post("/v1/batches", json=body | more, headers=headers)

    first, again = (create({"x-stainless-retry-count": count}).json()["id"] for count in ("0", "1"))
    assert first == again
    assert create({"x-stainless-retry-count": "0"}).json()["id"] != first
    assert create({"x-stainless-retry-count": "1"}, metadata={"a": "b"}).json()["id"] != first
    keyed = [create({"Idempotency-Key": "mine"}) for _ in range(2)]
    assert keyed[0].json()["id"] == keyed[1].json()["id"]
    assert keyed[1].headers["idempotency-replayed"] == "true"
    other = create({"Idempotency-Key": "mine"}, metadata={"a": "b"})
    assert (other.status_code, other.json()["error"]["code"]) == (409, "idempotency_key_reuse")


# What is refused -----------------------------------------------------------------------------------------------------

GOOD = line("good")


def without(name):
    return {key: value for key, value in GOOD.items() if key != name}


@pytest.mark.parametrize(
    ("lines", "code", "number", "param"),
    [
        ([GOOD, b"{not json"], "invalid_json_line", 2, None),
        ([GOOD, b"[1]"], "invalid_json_line", 2, None),
        ([GOOD, b'{"custom_id": "\xff"}'], "invalid_json_line", 2, None),
        ([b"", GOOD, b"   ", b"nope"], "invalid_json_line", 4, None),
        ([without("custom_id")], "missing_required_parameter", 1, "custom_id"),
        ([without("body")], "missing_required_parameter", 1, "body"),
        ([GOOD | {"custom_id": 7}], "invalid_custom_id", 1, "custom_id"),
        ([GOOD | {"custom_id": "x" * 513}], "invalid_custom_id", 1, "custom_id"),
        ([GOOD, line("b"), GOOD], "duplicate_custom_id", 3, "custom_id"),
        ([GOOD | {"method": "GET"}], "invalid_method", 1, "method"),
        ([GOOD | {"url": "/v1/embeddings"}], "invalid_url", 1, "url"),
        ([GOOD | {"body": []}], "invalid_body", 1, "body"),
        ([GOOD | {"body": {}}], "missing_required_parameter", 1, "body.model"),
        ([line("b", model="nobody")], "model_not_found", 1, "body.model"),
        ([b"\n\n"], "empty_file", None, None),
        ([GOOD | {"body": {"model": "paper", "x": "y" * (5 << 20)}}], "line_too_large", 1, None),
    ],
    ids=range(16),
)  # fmt: skip
def test_an_input_that_is_no_batch_fails_with_the_line_and_the_field(client, lines, code, number, param):
    batch = wait_for_end(client, start(client, lines).id)
    assert (batch.status, batch.errors.object, batch.output_file_id) == ("failed", "list", None)
    assert batch.failed_at >= batch.created_at
    error = batch.errors.data[0]
    assert (error.code, error.line, error.param) == (code, number, param)
    assert batch.request_counts.model_dump() == {"total": 0, "completed": 0, "failed": 0}


def test_all_wrong_lines_are_told_up_to_a_hundred(client):
    batch = wait_for_end(client, start(client, [b"nope"] * 300).id)
    assert [error.line for error in batch.errors.data] == list(range(1, 101))


@pytest.mark.parametrize(
    ("change", "status", "param"),
    [
        ({"input_file_id": "file-" + "0" * 32}, 404, "input_file_id"),
        ({"input_file_id": "x"}, 422, "input_file_id"),
        ({"endpoint": "/v1/embeddings"}, 422, "endpoint"),
        ({"completion_window": "24"}, 422, "completion_window"),
        ({"completion_window": "0h"}, 422, "completion_window"),
        ({"completion_window": "31d"}, 422, "completion_window"),
        ({"metadata": {"a": 1}}, 422, "metadata.a"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 60}}, 422, "output_expires_after.seconds"),
        ({"colour": "red"}, 422, "colour"),
        ({"priority": 101}, 422, "priority"),
    ],
)
def test_bad_bodies_are_refused_by_field(api, client, change, status, param):
    file = client.files.create(file=("in.jsonl", jsonl([GOOD])), purpose="batch")
    body = {"input_file_id": file.id, "endpoint": CHAT, "completion_window": "24h"} | change
    with api.http() as http:
        answer = http.post("/v1/batches", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param)


def test_other_windows_and_lives_of_the_files_are_kept(client):
    made = start(client, [GOOD], window="90m", output_expires_after={"anchor": "created_at", "seconds": 7200})
    assert (made.completion_window, made.expires_at - made.created_at) == ("90m", 5400)
    batch = wait_for_end(client, made.id)
    info = client.files.retrieve(batch.output_file_id)
    assert info.expires_at - info.created_at == 7200


def test_a_file_that_a_batch_reads_is_not_deleted_before_its_end(client):
    made = start(client, [line("a", "hold on")])
    with pytest.raises(openai.ConflictError) as caught:
        client.files.delete(made.input_file_id)
    assert caught.value.code == "file_in_use"
    client.batches.cancel(made.id)
    wait_for_end(client, made.id)
    assert client.files.delete(made.input_file_id).deleted


def test_another_tenants_batches_are_not_found_like_those_that_are_not_there(api, client):
    made = wait_for_end(client, start(client, [line("a")]).id)
    key = new_key()
    api.worker.ledger.put_key(digest(key), "another", "")
    with api.http(headers={"authorization": f"Bearer {key}"}) as http:
        assert http.get("/v1/batches").json()["data"] == []
        for path in (made.id, "batch_1", "batch_" + "0" * 32):
            assert http.get(f"/v1/batches/{path}").json()["error"]["code"] == "batch_not_found"
            assert http.post(f"/v1/batches/{path}/cancel").status_code == 404
            assert http.post(f"/v1/batches/{path}/retry", json={}).status_code == 404
            assert http.get(f"/v1/batches/{path}/results").status_code == 404


# Order ---------------------------------------------------------------------------------------------------------------


def test_online_work_goes_before_the_lines_of_a_batch(api, client):
    api.worker.paused = True
    made = start(client, [line(f"line-{number}") for number in range(50)])
    ledger = Ledger.from_url(api.settings.redis_url, api.settings.namespace)
    until(lambda: ledger.stats().get("paper", {}).get("waiting") == 40)  # a window, not more
    with api.http() as http:
        body = {"body": {"model": "paper", "messages": [{"role": "user", "content": "say me"}], "priority": 100}}
        low = http.post("/v1/jobs", json=body | {"priority": 49}).json()
        assert http.get(f"/v1/jobs/{low['id']}").json()["queue_position"] == 0
    ledger.close()
    api.worker.renew()
    api.worker.ring("paper", 60)
    assert wait_for_end(client, made.id).request_counts.completed == 50


def test_lines_wait_for_their_tenants_quota_and_leave_room_for_its_chats(redis_url):
    limits = {"default": {"concurrent_jobs": 6, "requests_per_minute": 6000}}
    with running_api(redis_url, tenants=limits) as api, running_batches(api.settings, api.worker.ring):
        client = api.sdk()
        # given more lines than may be open at once, and a worker that has not begun
        api.worker.paused = True
        batch = start(client, [line(f"l{number}", "say ok") for number in range(8)])
        until(lambda: api.worker.ledger.stats().get("paper", {}).get("waiting") == 3)
        # then a chat is accepted beside them, and when the worker begins every line has its answer
        with api.http() as http:
            job = http.post("/v1/jobs", json={"body": {"model": "paper", "messages": line("x")["body"]["messages"]}})
            assert job.status_code == 202
        api.worker.paused = False
        api.worker.ring("paper", 1)
        ended = wait_for_end(client, batch.id)
        assert (ended.status, ended.request_counts.completed) == ("completed", 8)
