"""One contract for every store of files, and what only the one in Redis promises: it forgets with the job."""

import asyncio
import hashlib
import uuid

import pytest
import redis
from chaosproxy import ChaosProxy
from ledger_moves import claim, submit
from memory_store import MemoryStore

from inferfleet.tasks.errors import LedgerUnavailable, OutputDamaged, OutputNotFound
from inferfleet.tasks.ledger import AsyncLedger, Ledger
from inferfleet.tasks.names import job_of_output, new_job_id, output_id
from inferfleet.tasks.settings import Settings
from inferfleet.tasks.stores import RedisStore, open_async_store, open_store

PICTURE = bytes(range(256)) * 4096
DIGEST = hashlib.sha256(PICTURE).hexdigest()


class Waited:
    """An AsyncStore that is asked like a Store."""

    def __init__(self, settings):
        self._loop = asyncio.new_event_loop()
        self._ledger = AsyncLedger.from_url(settings.redis_url, "test")
        self._store = open_async_store(settings, self._ledger)

    def __getattr__(self, name):
        return lambda *args: self._loop.run_until_complete(getattr(self._store, name)(*args))

    def presign(self, *args, **about):
        return self._store.presign(*args, **about)

    def close(self):
        self._loop.run_until_complete(self._ledger.close())
        self._loop.close()


SLOW = [pytest.param(f"{kind}radosgw", marks=pytest.mark.slow) for kind in ("", "async ")]


@pytest.fixture(params=["redis", "async redis", "s3", "async s3", "memory", *SLOW])
def store(request, redis_url, ledger):
    kept = request.getfixturevalue("s3") if "s3" in request.param else {}
    if "radosgw" in request.param:
        kept = request.getfixturevalue("session_radosgw").settings(f"test-{uuid.uuid4().hex}")
    settings = Settings(redis_url=redis_url, namespace="test", **kept)
    if request.param.startswith("async"):
        store = Waited(settings)
        yield store
        store.close()
    else:
        yield MemoryStore() if request.param == "memory" else open_store(settings, ledger)


def test_a_file_reads_back_as_it_was_and_is_described(store):
    stored = store.put("out_1", PICTURE, "image/png")
    assert (stored.key, stored.content_type, stored.size_bytes, stored.sha256) == (
        "out_1", "image/png", len(PICTURE), DIGEST
    )  # fmt: skip
    assert store.get("out_1", DIGEST) == PICTURE


def test_writing_the_same_again_changes_nothing(store):
    assert store.put("out_1", PICTURE, "image/png") == store.put("out_1", PICTURE, "image/png")
    assert store.get("out_1", DIGEST) == PICTURE


def test_a_file_with_another_digest_is_told_and_not_given(store):
    store.put("out_1", PICTURE, "image/png")
    with pytest.raises(OutputDamaged):
        store.get("out_1", hashlib.sha256(b"other").hexdigest())


def test_a_file_that_is_not_there_is_not_found(store):
    with pytest.raises(OutputNotFound):
        store.get("out_1", DIGEST)


def test_forgotten_files_are_gone_and_the_others_stay(store):
    for key in ("out_1", "out_2", "out_3"):
        store.put(key, PICTURE, "image/png")
    store.forget(["out_1", "out_3", "out_never"])
    store.forget([])
    with pytest.raises(OutputNotFound):
        store.get("out_1", DIGEST)
    assert store.get("out_2", DIGEST) == PICTURE


def test_a_small_and_an_empty_file_are_files_too(store):
    for key, data in (("out_1", b"x"), ("out_2", b"")):
        assert store.put(key, data, "application/jsonl").size_bytes == len(data)
        assert store.get(key, hashlib.sha256(data).hexdigest()) == data


def test_a_link_is_given_by_stores_that_clients_may_ask(store, request):
    # Given what every store is asked in one way
    link = store.presign("out_1", content_type="image/png", filename="a.png", seconds=60)
    # Then it is a link for a while, with our type and as an attachment, or none
    if request.node.callspec.params["store"].endswith(("s3", "radosgw")):
        assert link.startswith("http://127.0.0.1:")
        assert "response-content-type=image%2Fpng" in link
        assert "response-content-disposition=attachment" in link
        assert "X-Amz-Expires=60" in link
    else:
        assert link is None


def test_an_id_of_a_file_names_its_job():
    job_id = new_job_id()
    assert job_of_output(output_id(job_id, 12, 3)) == job_id
    for other in ("", "out_", job_id, output_id("job_1", 1, 0), output_id(job_id, 1, 0) + "\n", "out_*"):
        assert job_of_output(other) is None


# In Redis ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def kept(ledger):
    return RedisStore(ledger, 60)


def ended(ledger, store, state="completed", fence=None, keys=("a", "b")):
    """A job of which a run wrote files and then said `state`."""
    submit(ledger)
    claimed = claim(ledger)
    for key in keys:
        store.put(key, PICTURE, "image/png")
    outputs = [{"id": key, "index": index} for index, key in enumerate(keys)]
    answer = ledger.complete("job_1", fence or claimed.fence, state=state, outputs=outputs, keep=keys)
    return answer, outputs


def ttl(ledger, key):
    return ledger.redis.pttl(f"{ledger.prefix}output:{key}")


def test_a_file_that_no_job_keeps_dies_by_itself_after_the_result_would(ledger, kept):
    kept.put("a", PICTURE, "image/png")
    assert 60_000 < ttl(ledger, "a") <= 60_000 + 3_600_000


def test_files_of_a_completed_job_stand_in_its_record_its_list_and_its_last_event_and_die_with_it(ledger, kept):
    answer, outputs = ended(ledger, kept)
    assert answer == "done"
    assert ledger.get("job_1").outputs == outputs
    assert ledger.list("a").jobs[0].outputs == outputs
    assert ledger.events("job_1")[-1]["outputs"] == outputs
    assert ttl(ledger, "a") == ttl(ledger, "b") == -1
    # when the job is deleted
    ledger.delete("job_1")
    with pytest.raises(OutputNotFound):
        kept.get("a", DIGEST)


def test_files_are_swept_with_their_job(ledger, kept):
    ended(ledger, kept)
    assert ledger.sweep(result_ttl_ms=60_000).deleted == 0
    assert kept.get("b", DIGEST) == PICTURE
    ledger.redis.zadd(f"{ledger.prefix}finished", {"job_1": 1})
    assert ledger.sweep(result_ttl_ms=60_000).deleted == 1
    assert ledger.redis.keys(f"{ledger.prefix}output:*") == []


@pytest.mark.parametrize("state", ["failed", "cancelled", "expired", "incomplete"])
def test_files_of_a_job_that_ends_otherwise_are_deleted_and_stand_nowhere(ledger, kept, state):
    assert ended(ledger, kept, state)[0] == "done"
    assert ledger.get("job_1").outputs is None
    assert "outputs" not in ledger.events("job_1")[-1]
    assert ledger.redis.keys(f"{ledger.prefix}output:*") == []


def test_a_job_that_is_cancelled_while_it_completes_shows_no_file(ledger, kept):
    submit(ledger)
    fence = claim(ledger).fence
    kept.put("a", PICTURE, "image/png")
    ledger.cancel("job_1")
    assert ledger.complete("job_1", fence, state="completed", outputs=[{"id": "a"}], keep=["a"]) == "done"
    assert (ledger.get("job_1").state, ledger.get("job_1").outputs) == ("cancelled", None)
    assert ledger.redis.keys(f"{ledger.prefix}output:*") == []


def test_files_of_a_stale_fence_are_deleted_and_never_seen(ledger, kept):
    answer, _ = ended(ledger, kept, fence=7)
    assert answer == "stale"
    assert ledger.get("job_1").outputs is None
    assert ledger.redis.keys(f"{ledger.prefix}output:*") == []


def test_a_job_does_not_complete_with_a_file_that_is_gone(ledger, kept):
    submit(ledger)
    fence = claim(ledger).fence
    kept.put("a", PICTURE, "image/png")
    end = {"state": "completed", "outputs": [{"id": "a"}, {"id": "b"}], "keep": ["a", "b"]}
    assert ledger.complete("job_1", fence, **end) == "missing"
    assert (ledger.get("job_1").state, ttl(ledger, "a") > 0) == ("in_progress", True)
    kept.put("b", PICTURE, "image/png")
    assert ledger.complete("job_1", fence, **end) == "done"


def test_lost_replies_of_every_call_leave_one_end_with_its_files(redis_server, ledger, kept):
    with ChaosProxy(redis_server.port) as proxy:
        shaky = Ledger.from_url(proxy.url, "test")
        shaky.redis.ping()
        for call in range(2):
            proxy.lose_next_reply()
            assert RedisStore(shaky, 60).put(f"k{call}", PICTURE, "image/png").sha256 == DIGEST
        submit(ledger)
        fence = claim(ledger).fence
        proxy.lose_next_reply()
        keys = ["k0", "k1"]
        shaky.complete("job_1", fence, state="completed", outputs=[{"id": key} for key in keys], keep=keys)
        assert proxy.lost == 3
        shaky.close()
    assert [event["type"] for event in ledger.events("job_1")].count("job.completed") == 1
    assert [kept.get(key, DIGEST) == PICTURE for key in keys] == [True, True]
    assert ttl(ledger, "k0") == -1


def test_a_redis_without_room_says_so_and_takes_the_file_once_there_is_room(own_redis):
    ledger = Ledger.from_url(own_redis.url, "test")
    store = RedisStore(ledger, 60)
    ledger.redis.config_set("maxmemory", 1)
    with pytest.raises(LedgerUnavailable, match="refuses to write"):
        store.put("a", PICTURE, "image/png")
    ledger.redis.config_set("maxmemory", 0)
    store.put("a", PICTURE, "image/png")
    assert store.get("a", DIGEST) == PICTURE
    ledger.close()


def test_progress_stands_in_the_record_until_another_attempt_begins(ledger):
    submit(ledger)
    fence = claim(ledger).fence
    events = [{"type": "job.progress", "step": step, "steps": 8} for step in (1, 2)]
    for _ in range(2):
        assert ledger.publish("job_1", fence, events, "t1") == "ok"
    ledger.publish("job_1", fence, [{"type": "job.preview", "index": 0}], "t2")
    assert ledger.get("job_1").progress == ledger.list("a").jobs[0].progress == {"step": 2, "steps": 8}
    ledger.release("job_1", fence)
    assert ledger.get("job_1").progress is None


def test_a_record_whose_redis_key_was_exchanged_is_told(redis_url, ledger, kept):
    kept.put("a", PICTURE, "image/png")
    with redis.Redis.from_url(redis_url) as stranger:
        stranger.set(f"{ledger.prefix}output:a", b"something else")
    with pytest.raises(OutputDamaged):
        kept.get("a", DIGEST)
