"""Which idempotency keys the ledger still knows, and what makes a key unknown."""

import asyncio

import pytest
from ledger_moves import claim, submit

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
