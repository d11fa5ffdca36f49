"""Which idempotency keys the ledger still knows: what makes a key unknown, and how a producer mends a failover."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from chaosproxy import ChaosProxy
from conftest import RedisServer
from fleet import until
from ledger_moves import claim, submit

from inferfleet.tasks.client import Client
from inferfleet.tasks.errors import InvalidRequest
from inferfleet.tasks.ledger import AsyncLedger
from inferfleet.tasks.lookup import Known


def test_keys_are_found_with_the_states_of_their_jobs_and_unknown_ones_are_told(ledger):
    submit(ledger, "job_1", idempotency_key="one")
    submit(ledger, "job_2", idempotency_key="two words ~")
    submit(ledger, "job_3")
    ledger.complete("job_1", claim(ledger).fence, state="completed", response=b"{}")

    found = ledger.lookup("a", ["two words ~", "nobody's", "one", "one", "job_3"])

    assert list(found) == ["two words ~", "nobody's", "one", "job_3"]
    assert found["two words ~"] == Known("job_2", "queued")
    assert found["one"] == Known("job_1", "completed")
    assert (found["nobody's"], found["job_3"]) == (None, None)


def test_the_async_ledger_finds_the_same(ledger, redis_url):
    submit(ledger, idempotency_key="k")

    async def asked() -> dict[str, Known | None]:
        other = AsyncLedger.from_url(redis_url, "test")
        try:
            return await other.lookup("a", ["k", "l"])
        finally:
            await other.close()

    assert asyncio.run(asked()) == {"k": Known("job_1", "queued"), "l": None}


def test_a_key_is_its_tenants_own(ledger):
    submit(ledger, "job_1", tenant="a", idempotency_key="k")
    assert ledger.lookup("b", ["k"]) == {"k": None}
    submit(ledger, "job_2", tenant="b", idempotency_key="k")
    assert ledger.lookup("a", ["k"]) == {"k": Known("job_1", "queued")}


@pytest.mark.parametrize("leads_to", ["job_gone", "job_other"])
def test_a_key_that_leads_to_no_job_of_its_tenant_is_unknown(ledger, leads_to):
    # given a key whose job is gone, or another tenant's, as no call of ours leaves it
    submit(ledger, "job_other", tenant="b")
    submit(ledger, "job_1", idempotency_key="k")
    (idem,) = ledger.redis.keys(f"{ledger.prefix}idem:*")
    ledger.redis.set(idem, leads_to)

    assert ledger.lookup("a", ["k"]) == {"k": None}


def test_a_key_is_forgotten_with_its_job(ledger):
    for number in range(3):
        submit(ledger, f"job_{number}", idempotency_key=f"k{number}")
    ledger.cancel("job_0")
    ledger.cancel("job_1")

    ledger.delete("job_0")
    assert [key for key, job in ledger.lookup("a", ["k0", "k1", "k2"]).items() if job] == ["k1", "k2"]
    ledger.sweep(result_ttl_ms=0)
    assert [key for key, job in ledger.lookup("a", ["k0", "k1", "k2"]).items() if job] == ["k2"]


def test_a_thousand_keys_are_one_question(ledger):
    for number in range(0, 1000, 10):
        submit(ledger, f"job_{number}", idempotency_key=f"{number:0255}")
    before = ledger.redis.info("commandstats")["cmdstat_evalsha"]["calls"]

    found = ledger.lookup("a", [f"{number:0255}" for number in range(1000)])

    assert [int(key) for key, job in found.items() if job] == list(range(0, 1000, 10))
    assert ledger.redis.info("commandstats")["cmdstat_evalsha"]["calls"] <= before + 2


@pytest.mark.parametrize(
    ("keys", "param", "said"),
    [
        ([], "idempotency_keys", "1 to 1000"),
        (["k"] * 1001, "idempotency_keys", "1 to 1000"),
        ("key", "idempotency_keys", "a list"),
        (["k", ""], "idempotency_keys.1", "1 to 255"),
        (["k" * 256], "idempotency_keys.0", "1 to 255"),
        (["k", "k", " k"], "idempotency_keys.2", "printable ASCII"),
        (["k\n"], "idempotency_keys.0", "printable ASCII"),
        (["é"], "idempotency_keys.0", "printable ASCII"),
        ([7], "idempotency_keys.0", "printable ASCII"),
    ],
)
def test_keys_that_no_job_can_have_are_refused_by_place(ledger, keys, param, said):
    with pytest.raises(InvalidRequest, match=said) as caught:
        ledger.lookup("a", keys)
    assert caught.value.param == param


# A failover ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def replica(redis_binary_path: str, own_redis: RedisServer, tmp_path: Path) -> Iterator[tuple[RedisServer, ChaosProxy]]:
    """A replica of own_redis, and the link between them."""
    folder = tmp_path / "replica"
    folder.mkdir()
    server = RedisServer(redis_binary_path, folder)
    server.start()
    with ChaosProxy(own_redis.port) as link:
        with redis.Redis(port=own_redis.port) as primary:
            primary.config_set("repl-diskless-sync-delay", 0)
        with redis.Redis(port=server.port) as admin:
            admin.replicaof("127.0.0.1", link.port)
            until(lambda: admin.info("replication")["master_link_status"] == "up")
        yield server, link
    server.kill()


def test_after_a_failover_to_a_replica_that_lagged_a_producer_finds_and_submits_again_what_was_lost(own_redis, replica):
    # given jobs that the replica has, and jobs that were accepted while its link was silent
    server, link = replica
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
    keys = [f"order {number}" for number in range(10)]
    with Client(own_redis.url, "test", models=["m"]) as client, redis.Redis(port=own_redis.port) as primary:
        kept = {key: client.submit(body, idempotency_key=key).id for key in keys[:6]}
        primary.set("mark", 1)  # WAIT is about the writes of its own connection, and all before them
        assert primary.wait(1, 10_000) == 1
        link.faults.mute = True
        lost = {key: client.submit(body, idempotency_key=key).id for key in keys[6:]}
    # when the replica takes the place of its primary
    own_redis.kill()
    with redis.Redis(port=server.port) as admin:
        admin.replicaof("NO", "ONE")
    with Client(server.url, "test", models=["m"]) as client:
        found = client.lookup(keys)
        # then the producer learns which jobs are gone, and each key has one job once it has submitted those again
        assert found == kept | dict.fromkeys(lost)
        again = {key: client.submit(body, idempotency_key=key).id for key, job in found.items() if job is None}
        assert client.lookup(keys) == kept | again
        assert len(client.list(limit=100).jobs) == len(keys)
