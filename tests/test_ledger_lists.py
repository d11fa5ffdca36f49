"""Pages of jobs, and the roster: cards, workers and API keys."""

import pytest
from ledger_moves import claim, submit

from inferfleet.tasks import calls
from inferfleet.tasks.errors import InvalidRequest, JobNotFound


def pages(ledger, tenant="a", **filters):
    """Every page's ids, following the last id of each."""
    found, after = [], None
    while True:
        page = ledger.list(tenant, after=after, **filters)
        found.append([job.id for job in page.jobs])
        if not page.has_more:
            return found
        after = page.jobs[-1].id


def test_pages_run_from_the_newest_to_the_oldest_without_gap_or_double(ledger):
    for i in range(7):
        submit(ledger, f"job_{i}")
    assert pages(ledger, limit=3) == [["job_6", "job_5", "job_4"], ["job_3", "job_2", "job_1"], ["job_0"]]
    assert pages(ledger, limit=7) == [["job_6", "job_5", "job_4", "job_3", "job_2", "job_1", "job_0"]]
    assert pages(ledger, "nobody") == [[]]


def test_a_job_that_ends_between_two_pages_moves_nothing(ledger):
    for i in range(4):
        submit(ledger, f"job_{i}")
    first = ledger.list("a", status="queued", limit=2)
    ledger.cancel("job_2")
    assert [job.id for job in ledger.list("a", status="queued", after=first.jobs[-1].id, limit=2).jobs] == [
        "job_1",
        "job_0",
    ]


def test_filters_by_status_model_and_metadata(ledger):
    for i in range(6):
        submit(ledger, f"job_{i}", model="m" if i % 2 else "n", metadata={"team": "x" if i < 3 else "y", "z": "1"})
    claim(ledger)
    assert pages(ledger, status="in_progress") == [["job_1"]]
    assert pages(ledger, status="queued", model="m") == [["job_5", "job_3"]]
    assert pages(ledger, model="n", metadata={"team": "x"}) == [["job_2", "job_0"]]
    assert pages(ledger, metadata={"team": "y", "z": "1"}, limit=2) == [["job_5", "job_4"], ["job_3"]]
    assert pages(ledger, metadata={"team": "y", "z": "2"}) == [[]]
    assert pages(ledger, metadata={"absent": "1"}) == [[]]


def test_a_rare_match_is_found_however_far_back(ledger, monkeypatch):
    # given scans so short that most see no match
    monkeypatch.setattr(calls, "ENTRIES_PER_SCAN", 3)
    for i in range(20):
        submit(ledger, f"job_{i:02}", model="rare" if i in (0, 1, 9) else "m")
    assert pages(ledger, model="rare", limit=2) == [["job_09", "job_01"], ["job_00"]]


def test_pages_carry_no_response_bodies(ledger):
    submit(ledger)
    ledger.complete("job_1", claim(ledger).fence, state="completed", response=b"{}")
    assert ledger.list("a").jobs[0].response is None
    assert ledger.get("job_1").response == b"{}"


@pytest.mark.parametrize(
    ("options", "said"),
    [({"limit": 0}, "between 1 and 100"), ({"limit": 101}, "between 1 and 100"), ({"status": "done"}, "one of queued")],
)
def test_a_bad_page_is_refused(ledger, options, said):
    with pytest.raises(InvalidRequest, match=said):
        ledger.list("a", **options)


def test_a_page_after_an_unknown_job_is_not_found(ledger):
    with pytest.raises(JobNotFound) as caught:
        ledger.list("a", after="job_none")
    assert caught.value.param == "after"


# Who is here ---------------------------------------------------------------------------------------------------------


def test_a_ready_workers_card_goes_before_one_that_loads(ledger):
    ledger.put_card("m", {"id": "m", "state": "loading"}, "w1", 60)
    assert ledger.cards()["m"]["state"] == "loading"
    ledger.put_card("m", {"id": "m", "state": "ready"}, "w2", 60)
    ledger.put_card("m", {"id": "m", "state": "loading"}, "w3", 60)
    ledger.put_card("n/q", {"id": "n/q", "state": "ready"}, "w1", 60)
    assert {model: card["state"] for model, card in ledger.cards().items()} == {"m": "ready", "n/q": "ready"}


def test_a_card_and_a_worker_leave_by_their_word_or_by_their_time(ledger):
    ledger.put_card("m", {"id": "m"}, "w", 60)
    ledger.put_worker("w", {"pid": 1}, 60)
    ledger.put_worker("dead", {"pid": 2}, 0.001)
    while "dead" in ledger.workers():
        pass
    assert ledger.workers() == {"w": {"pid": 1}}
    assert ledger.redis.hlen(f"{ledger.prefix}cards:worker") == 1
    ledger.put_card("m", {}, "w", 0)
    ledger.put_worker("w", {}, 0)
    assert (ledger.cards(), ledger.workers()) == ({}, {})


def test_a_model_whose_workers_fell_silent_is_remembered_for_a_while_as_unserved(ledger):
    ledger.put_card("m", {"id": "m", "state": "ready", "sizes": []}, "w1", 0.001)
    while ledger.cards()["m"]["state"] == "ready":
        pass
    assert ledger.cards() == {"m": {"id": "m", "state": "unserved", "sizes": []}}
    # a worker that is there is believed
    ledger.put_card("m", {"id": "m", "state": "loading"}, "w2", 60)
    assert ledger.cards()["m"]["state"] == "loading"
    # one that leaves by its word is not remembered, nor is one that was silent for long
    ledger.put_card("m", {}, "w2", 0)
    ledger.redis.zincrby(f"{ledger.prefix}here:model", -601_000, "m\nw1")
    assert ledger.cards() == {}
    assert ledger.redis.hlen(f"{ledger.prefix}cards:model") == 0


def test_of_processes_that_fell_silent_none_is_told_however_many_they_are(ledger):
    names = [f"dead{number}" for number in range(201)]  # more than one call forgets
    for name in ("b", *names):
        ledger.put_role("batches", name, {"host": "h"}, 60)
    ledger.redis.zadd(f"{ledger.prefix}here:role:batches", dict.fromkeys(names, 0))
    assert ledger.roles("batches") == {"b": {"host": "h"}}


def test_api_keys_are_found_by_their_digest_until_deleted(ledger):
    ledger.put_key("digest1", "a", "laptop")
    ledger.put_key("digest2", "b", "ci")
    assert ledger.find_key("digest1") == {"tenant": "a", "name": "laptop"}
    assert set(ledger.list_keys()) == {"digest1", "digest2"}
    ledger.delete_key("digest1")
    ledger.delete_key("digest1")
    assert ledger.find_key("digest1") is None
