"""Making, stopping and repeating batches over wires that lose answers: what the SDK sends again is done once."""

import threading
from collections import Counter
from urllib.parse import urlsplit

import openai
import pytest
from chaosproxy import ChaosProxy
from live_api import running_api
from live_batches import jsonl, line, running_batches, start, wait_for_end

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def shared_api(session_redis):
    with running_api(session_redis.url) as api, running_batches(api.settings, api.worker.ring):
        yield api


@pytest.fixture
def wire(api):
    """A way to the API that can lose its answers."""
    with ChaosProxy(urlsplit(api.url).port) as proxy:
        yield proxy


@pytest.fixture
def client(wire):
    with openai.OpenAI(
        base_url=f"http://127.0.0.1:{wire.port}/v1", api_key="none", max_retries=4, timeout=30
    ) as client:
        yield client


def everything(api):
    """Ids of the files for input, and of the batches."""
    client = api.sdk()
    return {file.id for file in client.files.list(purpose="batch")}, {batch.id for batch in client.batches.list()}


def test_answers_that_are_lost_on_the_way_to_the_sdk_double_neither_files_nor_batches(api, client, wire):
    files, batches = everything(api)
    for number in range(2):
        # Given an upload and a batch of which the first answers are lost
        lost = wire.lost
        wire.lose_next_reply(1 + number % 2)
        file = client.files.create(file=(f"{number}.jsonl", jsonl([line(f"{number}")])), purpose="batch")
        wire.lose_next_reply(1 + number % 2)
        made = client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")
        assert wire.lost - lost == 2 * (1 + number % 2)
        # Then there is one of each more, and it is the one that the SDK was told
        now_files, now_batches = everything(api)
        assert (now_files - files, now_batches - batches) == ({file.id}, {made.id})
        files, batches = now_files, now_batches
        # and it runs
        wire.lose_next_reply()
        assert wait_for_end(client, made.id).request_counts.completed == 1


def test_what_is_stopped_and_run_again_over_such_a_wire_is_so_once(api, client, wire):
    made = start(client, [line("a", "hold on")])
    wire.lose_next_reply(2)
    assert client.batches.cancel(made.id).status in ("cancelling", "cancelled")
    assert wait_for_end(client, made.id).request_counts.failed == 1
    _, before = everything(api)
    wire.lose_next_reply(2)
    again = client.post(f"/batches/{made.id}/retry", body={}, cast_to=openai.types.Batch)
    _, after = everything(api)
    assert after - before == {again.id}
    client.batches.cancel(again.id)
    wait_for_end(client, again.id)


def test_many_that_bring_one_key_at_once_are_given_one_batch(api):
    client = api.sdk()
    file = client.files.create(file=("in.jsonl", jsonl([line("a")])), purpose="batch")
    answers = Counter()

    def create():
        with api.http() as http:
            body = {"input_file_id": file.id, "endpoint": CHAT, "completion_window": "1d"}
            answers[http.post("/v1/batches", json=body, headers={"idempotency-key": "all of us"}).json()["id"]] += 1

    threads = [threading.Thread(target=create) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(answers.values()) == [16]


def test_replies_of_redis_that_the_api_loses_double_nothing(session_redis):
    with ChaosProxy(session_redis.port) as proxy, running_api(proxy.url) as api, api.http() as http:
        client = api.sdk(max_retries=4)
        proxy.faults.lose_chance = 0.1
        made, files = [], []
        for number in range(10):
            file = client.files.create(file=("in.jsonl", jsonl([line("a")])), purpose="batch")
            files.append(file.id)
            made.append(client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window=f"{number + 1}h"))
        proxy.faults.lose_chance = 0
        assert proxy.lost > 5
        assert everything(api) == ({*files}, {batch.id for batch in made})
        assert [batch.expires_at - batch.created_at for batch in made] == [3600 * (n + 1) for n in range(10)]
        assert http.get("/health").status_code == 200


@pytest.mark.parametrize(
    ("window", "seconds"), [("1m", 60), ("24h", 86400), ("30d", 30 * 86400), ("43200m", 30 * 86400)]
)
def test_every_window_of_minutes_hours_or_days_is_kept(api, window, seconds):
    client = api.sdk()
    made = start(client, [line("a")], window=window)
    assert made.expires_at - made.created_at == seconds
    wait_for_end(client, made.id)
