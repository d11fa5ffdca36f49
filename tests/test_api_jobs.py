"""/v1/jobs over HTTP: a job's whole life, its events, and what is refused."""

import concurrent.futures
import json
import threading
from collections.abc import Iterator

import httpx2
import pytest
from fleet import until
from live_api import LiveApi, running_api

from inferfleet.tasks import names


@pytest.fixture(scope="module")
def shared_api(session_redis) -> Iterator[LiveApi]:
    with running_api(session_redis.url) as api:
        yield api


def job(text: str, **options) -> dict:
    return {"body": {"model": "paper", "messages": [{"role": "user", "content": text}]}, **options}


def queued(api: LiveApi, http: httpx2.Client, text: str = "say hi", **options) -> str:
    """The id of a job that nobody carries."""
    api.worker.paused = True
    return http.post("/v1/jobs", json=job(text, **options)).json()["id"]


def events_of(answer: httpx2.Response) -> list[dict]:
    return [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: ")]


def test_a_job_is_accepted_carried_and_shown_with_its_answer(http):
    accepted = http.post("/v1/jobs", json=job("say hello", custom_id="mine", metadata={"team": "a"}))
    assert accepted.status_code == 202
    assert accepted.headers["location"] == f"/v1/jobs/{accepted.json()['id']}"

    done = http.get(accepted.headers["location"], params={"wait": 30}).json()

    assert done["status"] == "completed"
    assert done["response"]["body"]["choices"][0]["message"]["content"] == "hello"
    assert (done["custom_id"], done["metadata"], done["attempts"]) == ("mine", {"team": "a"}, 1)
    assert done["usage"]["total_tokens"] == 4
    assert done["created_at"] <= done["started_at"] <= done["completed_at"]


def test_a_job_that_was_asked_to_wait_comes_back_ended(http):
    answer = http.post("/v1/jobs", json=job("say hello"), headers={"Prefer": "wait=30"})

    assert (answer.status_code, answer.json()["status"]) == (200, "completed")


def test_a_wait_that_is_over_shows_the_job_as_it_is(api, http):
    job_id = queued(api, http)

    answer = http.get(f"/v1/jobs/{job_id}", params={"wait": 1})

    assert answer.json()["status"] == "queued"
    assert answer.headers["openai-poll-after-ms"] == "1000"
    assert answer.json()["queue_position"] is not None


def test_putting_the_same_job_twice_makes_one_job(api, http):
    api.worker.paused = True
    path = f"/v1/jobs/{names.new_job_id()}"

    first, second = http.put(path, json=job("say hi")), http.put(path, json=job("say hi"))
    other = http.put(path, json=job("say something else"))

    assert (first.status_code, second.status_code) == (202, 202)
    assert first.json()["id"] == second.json()["id"] == path.rpartition("/")[2]
    assert "idempotency-replayed" not in first.headers
    assert second.headers["idempotency-replayed"] == "true"
    assert (other.status_code, other.json()["error"]["code"]) == (409, "idempotency_key_reuse")


def test_a_job_id_of_another_shape_is_refused(http):
    answer = http.put("/v1/jobs/my-job", json=job("say hi"))

    assert (answer.status_code, answer.json()["error"]["param"]) == (422, "job_id")


def test_jobs_are_listed_newest_first_filtered_and_in_pages(api, http):
    mark = names.new_job_id()
    ids = [queued(api, http, metadata={"mark": mark, "number": str(number)}) for number in range(5)]
    asked = {"metadata[mark]": mark, "limit": 2}

    first = http.get("/v1/jobs", params=asked).json()
    second = http.get("/v1/jobs", params={**asked, "after": first["last_id"]}).json()
    third = http.get("/v1/jobs", params={**asked, "after": second["last_id"]}).json()
    one = http.get("/v1/jobs", params={"metadata[number]": "3", "metadata[mark]": mark, "status": "queued"}).json()

    assert [entry["id"] for page in (first, second, third) for entry in page["data"]] == ids[::-1]
    assert [page["has_more"] for page in (first, second, third)] == [True, True, False]
    assert [entry["id"] for entry in one["data"]] == [ids[3]]


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("status=running", "status"),
        ("limit=0", "limit"),
        ("limit=101", "limit"),
        ("limit=ten", "limit"),
        ("stats=queued", "stats"),
    ],
)
def test_a_wrong_list_parameter_is_refused_by_name(http, query, param):
    answer = http.get(f"/v1/jobs?{query}")

    assert (answer.status_code, answer.json()["error"]["param"]) == (422, param)


def test_a_queued_job_is_cancelled_at_once_and_only_the_end_is_final(api, http):
    job_id = queued(api, http)

    cancelled = http.post(f"/v1/jobs/{job_id}/cancel")
    result = http.get(f"/v1/jobs/{job_id}/result")

    assert (cancelled.status_code, cancelled.json()["status"]) == (202, "cancelled")
    assert (result.status_code, result.json()["error"]["code"]) == (409, "cancelled")


def test_a_running_job_is_cancelling_and_then_cancelled_with_its_usage(http):
    job_id = http.post("/v1/jobs", json=job("hold on")).json()["id"]
    with http.stream("GET", f"/v1/jobs/{job_id}/events") as stream:
        next(line for line in stream.iter_lines() if line.startswith("data") and "delta" in line)

    answer = http.post(f"/v1/jobs/{job_id}/cancel")
    done = http.get(f"/v1/jobs/{job_id}", params={"wait": 30}).json()

    assert (answer.status_code, answer.json()["status"]) in [(202, "cancelling"), (202, "cancelled")]
    assert (done["status"], done["usage"]["completion_tokens"]) == ("cancelled", 1)


def test_a_finished_job_cannot_be_cancelled(http):
    job_id = http.post("/v1/jobs", json=job("say hi"), headers={"Prefer": "wait=30"}).json()["id"]

    answer = http.post(f"/v1/jobs/{job_id}/cancel")

    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "already_terminal")
    assert answer.headers["x-should-retry"] == "false"


def test_priority_and_deadline_change_while_a_job_waits_and_not_later(api, http):
    job_id = queued(api, http)

    changed = http.patch(f"/v1/jobs/{job_id}", json={"priority": -5, "deadline": 4102444800})
    http.post(f"/v1/jobs/{job_id}/cancel")
    late = http.patch(f"/v1/jobs/{job_id}", json={"priority": 1})

    assert (changed.json()["priority"], changed.json()["deadline"]) == (-5, 4102444800)
    assert (late.status_code, late.json()["error"]["code"]) == (409, "not_queued")


@pytest.mark.parametrize(
    ("change", "param"),
    [({"priority": 101}, "priority"), ({"priority": True}, "priority"), ({"prio": 1}, "prio"), ({}, "priority")],
)
def test_a_wrong_change_is_refused_by_name(api, http, change, param):
    answer = http.patch(f"/v1/jobs/{queued(api, http)}", json=change)

    assert (answer.status_code, answer.json()["error"]["param"]) == (422, param)


def test_a_failed_job_is_retried_under_its_own_id(http):
    failed = http.post("/v1/jobs", json=job("fail engine_error"), headers={"Prefer": "wait=30"}).json()
    assert (failed["status"], failed["error"]["code"]) == ("failed", "engine_error")

    again = http.post(f"/v1/jobs/{failed['id']}/retry")
    done = http.get(f"/v1/jobs/{failed['id']}", params={"wait": 30}).json()

    assert (again.status_code, again.json()["id"]) == (202, failed["id"])
    assert (done["status"], done["attempts"]) == ("failed", 1)


def test_the_result_is_the_answer_alone_and_a_deleted_job_is_gone(http):
    job_id = http.post("/v1/jobs", json=job("say hi"), headers={"Prefer": "wait=30"}).json()["id"]

    result = http.get(f"/v1/jobs/{job_id}/result").json()
    deleted = http.delete(f"/v1/jobs/{job_id}")

    assert result["object"] == "chat.completion"
    assert deleted.json() == {"id": job_id, "object": "job.deleted", "deleted": True}
    assert http.get(f"/v1/jobs/{job_id}").json()["error"]["code"] == "job_not_found"


def test_a_job_that_has_not_ended_has_no_result_and_cannot_be_deleted(api, http):
    job_id = queued(api, http)

    for answer in (http.get(f"/v1/jobs/{job_id}/result"), http.delete(f"/v1/jobs/{job_id}")):
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "not_terminal")


@pytest.mark.parametrize("job_id", ["job_" + "0" * 32, "job_1", "..%2f..%2fetc", "job_" + "g" * 32])
def test_an_unknown_job_is_not_found_whatever_its_name(http, job_id):
    for answer in (http.get(f"/v1/jobs/{job_id}"), http.delete(f"/v1/jobs/{job_id}")):
        assert answer.status_code == 404
        assert answer.json()["error"]["type"] == "invalid_request_error"


def test_events_tell_the_whole_story_with_growing_numbers(http):
    job_id = http.post("/v1/jobs", json=job("say one two")).json()["id"]

    with http.stream("GET", f"/v1/jobs/{job_id}/events") as stream:
        events = events_of(stream)

    assert [event["type"] for event in events] == [
        "job.queued",
        "job.in_progress",
        "response.output_text.delta",
        "response.output_text.delta",
        "job.completed",
    ]
    assert [event["sequence_number"] for event in events] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("how", ["query", "header"])
def test_events_go_on_behind_the_last_one_seen(http, how):
    job_id = http.post("/v1/jobs", json=job("say one two"), headers={"Prefer": "wait=30"}).json()["id"]
    given = {"params": {"starting_after": 2}} if how == "query" else {"headers": {"Last-Event-ID": "2"}}

    with http.stream("GET", f"/v1/jobs/{job_id}/events", **given) as stream:
        events = events_of(stream)

    assert [event["sequence_number"] for event in events] == [3, 4]


def test_events_of_a_running_job_are_resumed_while_they_come(http):
    job_id = http.post("/v1/jobs", json=job("hold one")).json()["id"]
    with http.stream("GET", f"/v1/jobs/{job_id}/events") as stream:
        seen = json.loads(
            next(line for line in stream.iter_lines() if line.startswith("data") and "delta" in line)[6:]
        )["sequence_number"]

    rest: list[dict] = []
    with http.stream("GET", f"/v1/jobs/{job_id}/events", params={"starting_after": seen}) as stream:
        reading = threading.Thread(target=lambda: rest.extend(events_of(stream)))
        reading.start()
        http.post(f"/v1/jobs/{job_id}/cancel")
        reading.join(30)

    assert rest[-1]["type"] == "job.cancelled"
    assert [event["sequence_number"] for event in rest] == list(range(seen + 1, seen + 1 + len(rest)))


def test_a_reader_of_an_ended_job_is_told_not_to_come_back(http):
    job_id = http.post("/v1/jobs", json=job("say hi"), headers={"Prefer": "wait=30"}).json()["id"]

    assert http.get(f"/v1/jobs/{job_id}/events", params={"starting_after": 3}).status_code == 204


def test_a_last_event_id_that_is_no_number_is_refused_by_name(api, http):
    answer = http.get(f"/v1/jobs/{queued(api, http)}/events", headers={"Last-Event-ID": "abc"})

    assert (answer.status_code, answer.json()["error"]["param"]) == (422, "Last-Event-ID")


@pytest.mark.parametrize("place", [1000, 2**53, 2**53 + 1, 99999999999999999999, -2])
def test_a_place_that_no_event_has_reached_is_refused(api, http, place):
    answer = http.get(f"/v1/jobs/{queued(api, http)}/events", params={"starting_after": place})

    assert (answer.status_code, answer.json()["error"]["param"]) == (422, "starting_after")


def test_two_readers_of_one_job_both_see_all_of_it(http):
    job_id = http.post("/v1/jobs", json=job("hold one two")).json()["id"]
    seen: list[list[dict]] = [[], []]

    def read(into: list[dict]) -> None:
        with http.stream("GET", f"/v1/jobs/{job_id}/events") as stream:
            into.extend(events_of(stream))

    readers = [threading.Thread(target=read, args=(into,)) for into in seen]
    for reader in readers:
        reader.start()
    http.post(f"/v1/jobs/{job_id}/cancel")
    for reader in readers:
        reader.join(30)

    assert seen[0] == seen[1]
    assert [event["sequence_number"] for event in seen[0]] == list(range(len(seen[0])))
    assert seen[0][-1]["type"] == "job.cancelled"


def test_a_shutdown_ends_long_polls_and_event_streams_at_once_but_not_answers(session_redis):
    # Given a poll, an event stream and a chat that all wait, when the server is told to stop,
    with running_api(session_redis.url, drain=20) as api, api.http() as http:
        job_id = http.post("/v1/jobs", json=job("hold on")).json()["id"]
        body = job("hold on")["body"]
        with concurrent.futures.ThreadPoolExecutor(3) as pool:
            poll = pool.submit(http.get, f"/v1/jobs/{job_id}", params={"wait": 60})
            stream = pool.submit(http.get, f"/v1/jobs/{job_id}/events")
            chat = pool.submit(http.post, "/v1/chat/completions", json=body)
            until(lambda: len(http.get("/v1/jobs", params={"status": "in_progress"}).json()["data"]) == 2)
            api.stop()

            # then the first two end with what is known, and the chat still gets its own end.
            assert poll.result(15).json()["status"] == "in_progress"
            assert events_of(stream.result(15))[-1]["type"] == "response.output_text.delta"
            for record in api.worker.ledger.list("default").jobs:
                api.worker.ledger.cancel(record.id)
            assert chat.result(15).json()["error"]["code"] == "cancelled"


# Idempotency ---------------------------------------------------------------------------------------------------------


def test_the_same_key_and_body_give_the_same_job(api, http):
    api.worker.paused = True
    headers = {"Idempotency-Key": names.new_job_id()}

    first = http.post("/v1/jobs", json=job("say hi"), headers=headers)
    second = http.post("/v1/jobs", json=job("say hi"), headers=headers)
    other = http.post("/v1/jobs", json=job("say ho"), headers=headers)

    assert first.json()["id"] == second.json()["id"]
    assert second.headers["idempotency-replayed"] == "true"
    assert (other.status_code, other.json()["error"]["code"]) == (409, "idempotency_key_reuse")


@pytest.mark.parametrize("key", ["", "x" * 256, "a\tb", "caf\xe9"])
def test_a_bad_key_is_refused_by_name(http, key):
    answer = http.post("/v1/jobs", json=job("say hi"), headers={"Idempotency-Key": key.encode("latin-1")})

    assert (answer.status_code, answer.json()["error"]["param"]) == (422, "Idempotency-Key")


def test_keys_are_looked_up_in_the_order_of_the_request(api, http):
    api.worker.paused = True
    keys = [names.new_job_id() for _ in range(3)]
    first, second = (
        http.post("/v1/jobs", json=job("say hi"), headers={"Idempotency-Key": key}).json()["id"] for key in keys[:2]
    )
    http.post(f"/v1/jobs/{second}/cancel")

    found = http.post("/v1/jobs/lookup", json={"idempotency_keys": [*keys[::-1], keys[0]]})
    http.delete(f"/v1/jobs/{second}")
    deleted = http.post("/v1/jobs/lookup", json={"idempotency_keys": keys[1:2]})

    known = {"idempotency_key": keys[0], "job_id": first, "status": "queued"}
    assert (found.status_code, found.json()["object"]) == (200, "list")
    assert found.json()["data"] == [
        {"idempotency_key": keys[2], "job_id": None, "status": None},
        {"idempotency_key": keys[1], "job_id": second, "status": "cancelled"},
        known,
        known,
    ]
    assert deleted.json()["data"] == [{"idempotency_key": keys[1], "job_id": None, "status": None}]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "idempotency_keys"),
        ({"idempotency_keys": "key"}, "idempotency_keys"),
        ({"idempotency_keys": []}, "idempotency_keys"),
        ({"idempotency_keys": ["k"] * 1001}, "idempotency_keys"),
        ({"idempotency_keys": ["k", 1]}, "idempotency_keys.1"),
        ({"idempotency_keys": ["k", "x" * 256]}, "idempotency_keys.1"),
        ({"idempotency_keys": [" k"]}, "idempotency_keys.0"),
        ({"idempotency_keys": ["k"], "keys": []}, "keys"),
    ],
)
def test_a_bad_lookup_is_refused_by_name(http, body, param):
    answer = http.post("/v1/jobs/lookup", json=body)

    assert (answer.status_code, answer.json()["error"]["param"]) == (422, param)


def test_a_repeat_of_the_sdk_finds_the_job_of_its_first_try(api, http):
    api.worker.paused = True
    body = job(f"say {names.new_job_id()}")

    first = http.post("/v1/jobs", json=body, headers={"x-stainless-retry-count": "0"})
    repeat = http.post("/v1/jobs", json=body, headers={"x-stainless-retry-count": "1"})
    anew = http.post("/v1/jobs", json=body, headers={"x-stainless-retry-count": "0"})

    assert repeat.json()["id"] == first.json()["id"]
    assert repeat.headers["idempotency-replayed"] == "true"
    assert anew.json()["id"] != first.json()["id"]


def test_a_repeat_of_the_sdk_after_a_cancelled_try_is_a_job_of_its_own(api, http):
    api.worker.paused = True
    body = job(f"say {names.new_job_id()}")
    first = http.post("/v1/jobs", json=body, headers={"x-stainless-retry-count": "0"}).json()["id"]
    http.post(f"/v1/jobs/{first}/cancel")

    repeat = http.post("/v1/jobs", json=body, headers={"x-stainless-retry-count": "1"})

    assert (repeat.status_code, repeat.json()["status"]) == (202, "queued")
    assert repeat.json()["id"] != first
