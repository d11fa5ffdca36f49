"""A whole fleet under random faults (soak/), and the checker that judges it (invariants.py)."""

import json

import invariants
import pytest
from fake_engine import answer
from invariants import Accepted
from ledger_moves import claim, submit
from outbox_moves import record, take
from receivers import Receiver
from soak.run import Soak

from inferfleet.tasks.webhooks import new_secret
from inferfleet.workers.flight import seed_of

LONG_SECONDS = 75


def soaked(seed, seconds, redis_binary_path, session_swift, tmp_path):
    verdict = Soak(seed, seconds, redis_binary_path, session_swift, tmp_path).run()
    print(verdict)
    assert verdict.wrong == []
    assert verdict.figures["accepted"] > 2 * seconds
    assert sum(verdict.faults.values()) >= seconds / 2


@pytest.mark.timeout(200)
def test_nothing_is_lost_and_nothing_done_twice_under_random_faults(redis_binary_path, session_swift, tmp_path):
    soaked(7, 8, redis_binary_path, session_swift, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", range(20))
def test_a_long_soak_of_each_seed(redis_binary_path, session_swift, tmp_path, seed):
    soaked(seed, LONG_SECONDS, redis_binary_path, session_swift, tmp_path)


# The checker ---------------------------------------------------------------------------------------------------------


def end(ledger, job_id, text, *, tokens=3):
    """A completed job that said `text`, as a worker would end it."""
    taken = claim(ledger, f"t-{job_id}")
    told = {"type": "response.output_text.delta", "index": 0, "delta": text}
    ledger.publish(taken.job_id, taken.fence, [told], "p")
    body = json.dumps({"choices": [{"message": {"content": text}}]}).encode()
    ledger.complete(taken.job_id, taken.fence, state="completed", response=body)
    return Accepted(job_id, tokens=tokens)


def test_the_checker_finds_nothing_in_a_fleet_at_rest(ledger):
    submit(ledger, "job_1", tenant="default")
    job = end(ledger, "job_1", answer(seed_of("job_1"), 3))
    assert invariants.jobs_wrong(ledger, [job], store=None) == []
    assert invariants.strangers(ledger, [job]) == invariants.unrest(ledger) == invariants.ownerless(ledger) == []


def test_the_checker_finds_jobs_that_are_lost_doubled_unfinished_or_wrong(ledger):
    for job_id in ("job_1", "job_2", "job_3"):
        submit(ledger, job_id, tenant="default")
    wrong_words = end(ledger, "job_1", "something else")
    running = Accepted(claim(ledger).job_id, tokens=3)
    lost = Accepted("job_9", tokens=3)
    doubled = Accepted("job_1", tokens=3, ids={"job_1", "job_3"})
    found = invariants.jobs_wrong(ledger, [wrong_words, running, lost, doubled], store=None)
    for words in ("job_1 has another text", "job_2 has not ended", "job_9 was accepted and is not", "one key made"):
        assert any(words in text for text in found), words
    assert invariants.strangers(ledger, [wrong_words, running]) == ["job_3 is there and was accepted by no answer"]
    assert any("leases is not empty" in text for text in invariants.unrest(ledger))


def test_the_checker_finds_keys_that_belong_to_nobody(ledger):
    client, prefix = ledger.redis, ledger.prefix
    client.set(f"{prefix}output:out_1", "bytes")
    client.rpush(f"{prefix}tries:job_7", "{}")
    client.set(f"{prefix}idem:abc", "job_7")
    client.set(f"{prefix}novelty", "1")
    client.set(f"{prefix}claim:w:t", "1 job_7", px=60_000)
    found = sorted(text.split()[0] for text in invariants.ownerless(ledger))
    assert found == ["idem:abc", "novelty", "output:out_1", "tries:job_7"]


def test_the_checker_finds_ends_that_nobody_was_told_of(ledger):
    secret = new_secret()
    ledger.rotate_secret(None, "default", secret)
    with Receiver() as receiver:
        submit(ledger, "job_1", tenant="default", webhook=receiver.url)
        job = end(ledger, "job_1", answer(seed_of("job_1"), 3))
        places, secrets = {receiver.url: receiver}, {receiver.url: secret}
        # what waits
        job.webhook = receiver.url
        (waits,) = invariants.told_wrong(ledger, [job], places, secrets)
        assert "is pending" in waits
        # what was never put into the outbox, and what was for no reason
        job.webhook = None
        assert any("without a reason" in text for text in invariants.told_wrong(ledger, [job], places, secrets))
        # what is said to have arrived, and did not
        record(ledger, take(ledger))
        job.webhook = receiver.url
        (unheard,) = invariants.told_wrong(ledger, [job], places, secrets)
        assert "its receiver heard nothing" in unheard
