"""The producer's client, sync and async alike: submit, get, wait, stream, cancel, list; and how little it loads."""

import asyncio
import json
import subprocess
import sys
import threading

import pytest
import redis
from ledger_moves import claim, delta

from inferfleet.tasks import doorbell, names
from inferfleet.tasks.client import AsyncClient, Client
from inferfleet.tasks.contracts import JobRequest, parse_chat, parse_images
from inferfleet.tasks.errors import (
    AlreadyTerminal,
    ContextLengthExceeded,
    IdempotencyKeyReuse,
    InvalidRequest,
    JobNotFound,
    ModelNotFound,
    OutputDamaged,
    OutputNotFound,
    QueueFull,
    RequestError,
    SettingsError,
)
from inferfleet.tasks.settings import S3Settings
from inferfleet.tasks.stores import RedisStore, store_at

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
ANSWER = {"choices": [{"message": {"role": "assistant", "content": "yes"}}]}


class Waited:
    """An AsyncClient that is asked like a Client, so that one test serves both."""

    def __init__(self, *args, **options):
        self._loop = asyncio.new_event_loop()
        self._client = AsyncClient(*args, **options)

    def __getattr__(self, name):
        return lambda *args, **options: self._loop.run_until_complete(getattr(self._client, name)(*args, **options))

    def stream(self, *args, **options):
        async def collected():
            return [event async for event in self._client.stream(*args, **options)]

        return self._loop.run_until_complete(collected())

    def close(self):
        self._loop.run_until_complete(self._client.close())
        self._loop.close()


@pytest.fixture(params=[Client, Waited])
def make(request, redis_url):
    """Makes clients that may submit model m."""
    made = []

    def one(**options):
        made.append(request.param(redis_url, "test", **({"models": ["m"]} | options)))
        return made[-1]

    yield one
    for client in made:
        client.close()


@pytest.fixture
def client(make):
    return make()


def turns(redis_url, model="m"):
    with redis.Redis.from_url(redis_url) as server:
        return [json.loads(message) for message in server.lrange(names.turn_queue(model, "test"), 0, -1)]


def carry(ledger, pieces=("y", "es")):
    """What a worker does with one job."""
    found = claim(ledger, token=names.new_job_id())
    for i, piece in enumerate(pieces):
        ledger.publish(found.job_id, found.fence, [delta(piece)], f"p{i}")
    ledger.complete(found.job_id, found.fence, state="completed", response=json.dumps(ANSWER).encode())


def test_a_submitted_job_waits_and_one_turn_is_rung(client, ledger, redis_url):
    job = client.submit(CHAT)
    assert (job.status, job.model, job.queue_position) == ("queued", "m", 0)
    assert claim(ledger).envelope == JobRequest.from_body(parse_chat(json.dumps(CHAT).encode())).envelope()
    (turn,) = turns(redis_url)
    assert turn["headers"]["task"] == names.TURN_TASK
    assert turn["content-type"] == "application/json"


def test_a_job_request_brings_its_options(client, ledger):
    wanted = {"custom_id": "c", "priority": -5, "deadline": 4_000_000_000, "metadata": {"k": "v"}, "body": CHAT}
    job = client.submit(wanted)
    assert (job.custom_id, job.priority, job.deadline, job.metadata) == ("c", -5, 4_000_000_000, {"k": "v"})
    assert client.submit(JobRequest.model_validate(wanted)).priority == -5
    assert client.submit(parse_chat(json.dumps(CHAT).encode())).priority == 0


def test_the_same_idempotency_key_gives_the_same_job_and_no_second_turn(client, redis_url):
    first, again = client.submit(CHAT, idempotency_key="k"), client.submit(CHAT, idempotency_key="k")
    assert first.id == again.id
    assert len(turns(redis_url)) == 1
    with pytest.raises(IdempotencyKeyReuse):
        client.submit(CHAT | {"n": 2}, idempotency_key="k")


def test_keys_are_looked_up_within_the_tenant(client, make):
    first, second = client.submit(CHAT, idempotency_key="one"), client.submit(CHAT, idempotency_key="two")
    assert client.lookup(["two", "never", "one"]) == {"two": second.id, "never": None, "one": first.id}
    assert make(tenant="other").lookup(("one", "two")) == {"one": None, "two": None}
    client.cancel(first.id)
    client.delete(first.id)
    assert client.lookup({"one": 1, "two": 2}.keys()) == {"one": None, "two": second.id}
    for keys, param in (([], "idempotency_keys"), (["one", "\n"], "idempotency_keys.1")):
        with pytest.raises(InvalidRequest) as caught:
            client.lookup(keys)
        assert caught.value.param == param


@pytest.mark.parametrize(("field", "url"), [("prompt", names.IMAGES_URL), ("input", names.RESPONSES_URL)])
def test_a_bare_body_of_another_kind_than_a_chat_is_told_the_url_that_it_needs(client, field, url):
    with pytest.raises(InvalidRequest) as caught:
        client.submit({"model": "m", field: "a red circle"})
    assert (caught.value.param, f'"url": "{url}"' in caught.value.message) == ("messages", True)


IMAGE = {"url": names.IMAGES_URL, "body": {"model": "m", "prompt": "a red circle"}}
PICTURES = [b"first picture", b"second picture"]


def paint(ledger, store=None, **end):
    """What a worker does with one image job."""
    found, store = claim(ledger, token=names.new_job_id()), store or RedisStore(ledger, 60)
    keys = [names.output_id(found.job_id, found.fence, index) for index in range(len(PICTURES))]
    stored = [store.put(key, data, "image/png") for key, data in zip(keys, PICTURES, strict=True)]
    outputs = [
        {"id": file.key, "index": index, "content_type": file.content_type, "size_bytes": file.size_bytes,
         "hash": f"sha256:{file.sha256}", "width": 16, "height": 16, "seed": index}
        for index, file in enumerate(stored)
    ]  # fmt: skip
    end = {"state": "completed", "response": b'{"data": []}', "outputs": outputs} | end
    end |= {"keep": keys} if store.in_ledger else {}
    ledger.complete(found.job_id, found.fence, **end)
    return found.job_id


def test_the_pictures_of_an_image_job_are_given_by_their_index(client, ledger):
    job = client.submit(IMAGE)
    assert job.endpoint == names.IMAGES_URL
    with pytest.raises(OutputNotFound, match="queued"):
        client.output(job.id)
    assert paint(ledger) == job.id
    done = client.wait(job.id)
    assert [output.index for output in done.outputs] == [0, 1]
    assert [client.output(job.id), client.output(job.id, index=1)] == PICTURES
    with pytest.raises(OutputNotFound, match="no picture 2"):
        client.output(job.id, index=2)


def test_pictures_that_lie_in_a_bucket_are_read_from_there(make, ledger, s3):
    kept = {"result_store": s3["result_store"], "s3": S3Settings(**s3["s3"])}
    client = make(**kept)
    job = client.submit(IMAGE)
    paint(ledger, store_at(kept["result_store"], kept["s3"], ledger, 60))
    assert [client.output(job.id), client.output(job.id, index=1)] == PICTURES


@pytest.mark.parametrize("place", ["gs://bucket", "s3://UPPER", "redis://\n"])
@pytest.mark.parametrize("face", [Client, AsyncClient])
def test_a_store_that_is_none_is_refused_by_name(face, place):
    with pytest.raises(SettingsError) as caught:
        face(result_store=place)
    assert caught.value.param == "result_store"


def test_pictures_of_another_tenant_or_of_a_deleted_job_are_not_there(make, ledger):
    client = make()
    job_id = client.submit(IMAGE).id
    paint(ledger)
    with pytest.raises(JobNotFound):
        make(tenant="other").output(job_id)
    client.delete(job_id)
    with pytest.raises(JobNotFound):
        client.output(job_id)


def test_a_picture_that_is_not_what_was_written_is_told(client, ledger):
    job_id = client.submit(IMAGE).id
    paint(ledger)
    ledger.redis.set(f"{ledger.prefix}output:{names.output_id(job_id, ledger.get(job_id).fence, 0)}", b"exchanged")
    with pytest.raises(OutputDamaged):
        client.output(job_id)


def test_a_bare_image_body_is_told_to_bring_its_url(client, ledger):
    with pytest.raises(InvalidRequest, match="/v1/images/generations"):
        client.submit(IMAGE["body"])
    body = parse_images(json.dumps(IMAGE["body"]).encode())
    assert client.submit(body).endpoint == names.IMAGES_URL


def test_an_image_job_is_checked_against_the_model_s_card(client, ledger):
    ledger.put_card("m", {"state": "ready", "kind": "text"}, "w", 60)
    with pytest.raises(InvalidRequest, match="/v1/chat/completions"):
        client.submit(IMAGE)


def test_wait_returns_the_answer(client, ledger):
    job = client.submit(CHAT)
    worker = threading.Thread(target=carry, args=(ledger,))
    worker.start()
    done = client.wait(job.id)
    worker.join()
    assert (done.status, done.text) == ("completed", "yes")
    assert client.get(job.id) == done
    assert client.wait(job.id, timeout=0) == done


def test_submit_can_wait_for_the_answer(client, ledger):
    ledger.put_worker("w", {}, 60)
    carrier = threading.Thread(target=carry_the_next, args=(ledger,))
    carrier.start()
    assert client.submit(CHAT, wait=True).text == "yes"
    carrier.join()


def carry_the_next(ledger):
    while not ledger.stats().get("m", {}).get("waiting"):
        pass
    carry(ledger)


def test_wait_gives_up_after_its_timeout_and_the_job_goes_on(client):
    job = client.submit(CHAT)
    with pytest.raises(TimeoutError, match="queued"):
        client.wait(job.id, timeout=0.05)
    assert client.get(job.id).status == "queued"


def test_stream_gives_every_event_once_up_to_the_last(client, ledger):
    job = client.submit(CHAT)
    worker = threading.Thread(target=carry, args=(ledger, "abc"))
    worker.start()
    events = list(client.stream(job.id))
    worker.join()
    assert [event["sequence_number"] for event in events] == list(range(6))
    assert [event["delta"] for event in events if event["type"] == names.DELTA] == ["a", "b", "c"]
    assert events[-1]["type"] == "job.completed"
    # and from the middle, and from behind the end
    assert list(client.stream(job.id, after=3)) == events[4:]
    assert list(client.stream(job.id, after=9)) == []


def test_cancel_and_retry(client, redis_url):
    job = client.submit(CHAT)
    assert client.cancel(job.id).status == "cancelled"
    assert client.retry(job.id).status == "queued"
    assert len(turns(redis_url)) == 2
    client.cancel(job.id)
    client.delete(job.id)
    with pytest.raises(JobNotFound):
        client.get(job.id)


def test_cancel_of_an_ended_job_says_so(client, ledger):
    job = client.submit(CHAT)
    carry(ledger)
    with pytest.raises(AlreadyTerminal):
        client.cancel(job.id)


def test_list_pages_through_the_tenants_jobs(client):
    ids = [client.submit(CHAT).id for _ in range(3)]
    page = client.list(limit=2)
    assert ([job.id for job in page.jobs], page.has_more) == (ids[:0:-1], True)
    rest = client.list(status="queued", after=page.jobs[-1].id)
    assert ([job.id for job in rest.jobs], rest.has_more) == (ids[:1], False)


def test_another_tenant_sees_nothing(client, make):
    job = client.submit(CHAT)
    stranger = make(tenant="stranger")
    assert stranger.list().jobs == []
    for ask in (stranger.get, stranger.cancel, stranger.wait, stranger.stream):
        with pytest.raises(JobNotFound):
            ask(job.id) if ask != stranger.stream else list(ask(job.id))


def test_a_model_that_nobody_serves_is_not_found_and_an_announced_one_is(make, ledger):
    client = make(models=())
    with pytest.raises(ModelNotFound, match="'m'"):
        client.submit(CHAT)
    ledger.put_card("m", {"id": "m", "max_model_len": 50, "vocab_size": 10, "max_token_bytes": 4}, "w", 60)
    assert client.submit(CHAT).status == "queued"
    assert list(client.models()) == ["m"]
    with pytest.raises(ContextLengthExceeded):
        client.submit(CHAT | {"max_tokens": 50})


def test_a_full_queue_is_refused(make):
    client = make(max_queued=1)
    client.submit(CHAT)
    with pytest.raises(QueueFull):
        client.submit(CHAT)


@pytest.mark.parametrize(
    "request_",
    [CHAT | {"temprature": 1}, {"body": CHAT, "what": 1}, CHAT | {"user": "\ud800"}, CHAT | {"seed": float("nan")},
     CHAT | {"user": object()}],
)  # fmt: skip
def test_a_bad_request_is_refused_before_anything_is_written(client, redis_url, request_):
    with pytest.raises(RequestError):
        client.submit(request_)
    with redis.Redis.from_url(redis_url) as server:
        assert server.dbsize() == 0


def test_a_broker_that_is_away_fails_no_submit(make, ledger, monkeypatch):
    client = make()
    monkeypatch.setattr("inferfleet.tasks.doorbell.CONNECT_TIMEOUT", 0.2)
    inner = getattr(client, "_client", client) if isinstance(client, Waited) else client
    inner._bell._redis_url = "redis://127.0.0.1:1/0"
    assert client.submit(CHAT).status == "queued"
    assert ledger.stats()["m"]["waiting"] == 1


def loaded_after(code):
    """Names of the heavy modules that are loaded after running `code` in a fresh interpreter."""
    heavy = ("torch", "celery", "kombu", "transformers", "numpy", "fastapi", "tokenizers")
    code += f"; import sys; print([name for name in {heavy} if name in sys.modules])"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_importing_the_client_loads_no_torch_and_no_celery():
    assert loaded_after("import inferfleet.tasks.client") == "[]"


def test_submitting_loads_celery_only_to_ring(redis_url):
    code = f"""
from inferfleet.tasks.client import Client
client = Client({redis_url!r}, 'test', models=['m'])
client.list()
import sys
assert 'celery' not in sys.modules
client.submit({CHAT!r})
client.close()"""
    assert loaded_after(code) == "['celery', 'kombu']"


@pytest.mark.parametrize("request_", [None, 7, "body", ["body"]])
def test_what_is_no_json_object_is_an_invalid_request(client, request_):
    with pytest.raises(InvalidRequest, match="a request is a JSON object"):
        client.submit(request_)


@pytest.mark.parametrize("key", ["", "x" * 256, "a\tb", "caf\xe9", 7])
def test_an_idempotency_key_has_the_limits_that_it_has_over_http(client, key):
    with pytest.raises(InvalidRequest, match="1 to 255 printable") as refused:
        client.submit(CHAT, idempotency_key=key)
    assert refused.value.param == "idempotency_key"


@pytest.mark.parametrize("after", [-2, 2**53 + 1, 10**25, "0", True])
def test_a_place_in_the_events_that_no_number_can_be_is_refused(client, after):
    job = client.submit(CHAT)
    with pytest.raises(InvalidRequest, match="between -1 and") as refused:
        list(client.stream(job.id, after=after))
    assert refused.value.param == "after"


def test_turns_that_nobody_takes_do_not_pile_up_for_ever(client, redis_url, monkeypatch):
    monkeypatch.setattr(doorbell, "MAX_RUNG", 3)
    for _ in range(5):
        client.cancel(client.submit(CHAT).id)
    assert len(turns(redis_url)) == 3

    bell = doorbell.Doorbell(redis_url, "test")
    assert bell.ring("m")
    assert bell.ring("other", 5)
    bell.close()
    assert [len(turns(redis_url)), len(turns(redis_url, "other"))] == [3, 3]
