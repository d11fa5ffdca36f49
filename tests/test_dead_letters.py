"""Dead letters: what is known of jobs that took down every worker, from the ledger to the command line."""

import pytest
from fleet import assert_published_once, until
from ledger_moves import claim, submit
from live_api import api_of_workers
from shell import shell

from inferfleet.tasks.errors import JobNotFound

NOWHERE = "job_" + "0" * 32


def die(ledger, job_id="job_1", times=2, **options):
    """Every worker that tries the job is lost."""
    submit(ledger, job_id, **options)
    for number in range(times):
        claimed = claim(ledger, f"{job_id}.{number}", worker=f"w{number}")
        ledger.lose(claimed.job_id, claimed.fence, max_deaths=times, reason=f"death {number}")


def test_a_dead_letter_is_listed_with_each_attempt_s_worker_time_and_death(ledger):
    submit(ledger, "job_alive", priority=9)
    die(ledger, "job_1")
    die(ledger, "job_2", model="m")
    page = ledger.dead_letters("a", limit=1)
    assert ([job.id for job in page.jobs], page.has_more) == (["job_2"], True)
    assert [job.id for job in ledger.dead_letters("a", after="job_2").jobs] == ["job_1"]
    assert ledger.dead_letters("b").jobs == ledger.dead_letters("a", model="other").jobs == []
    letter = ledger.dead_letter("job_1", "a")
    told = [(a.attempt, a.worker, a.how, a.reason) for a in letter.attempts]
    assert told == [(1, "w0", "lost", "death 0"), (2, "w1", "lost", "death 1")]
    assert all(a.claimed_ms <= a.ended_ms for a in letter.attempts)
    assert (letter.record.worker, letter.record.error["code"]) == ("w1", "worker_lost")


def test_a_crash_in_company_and_a_lapsed_lease_are_told_too(ledger):
    submit(ledger)
    ledger.release("job_1", claim(ledger, "t1", worker="w1").fence, suspect=True)
    ledger.release("job_1", claim(ledger, "t2", worker="w2").fence)
    claim(ledger, "t3", worker="w3", lease_ms=0)
    ledger.reap(max_deaths=1)
    attempts = ledger.dead_letter("job_1").attempts
    assert [(a.worker, a.how) for a in attempts] == [("w1", "crowd"), ("w3", "lost")]
    assert "lease" in attempts[1].reason


def test_only_the_last_attempts_are_kept_and_a_long_reason_is_cut(ledger):
    submit(ledger)
    for number in range(30):
        claimed = claim(ledger, f"t{number}")
        ledger.lose("job_1", claimed.fence, max_deaths=30, reason="x" * 10_000)
    attempts = ledger.dead_letter("job_1").attempts
    assert [a.attempt for a in attempts] == list(range(11, 31))
    assert {len(a.reason) for a in attempts} == {500}


def test_a_replayed_dead_letter_is_a_waiting_job_without_a_past(ledger):
    die(ledger)
    assert ledger.replay("job_1", "a") == "m"
    record = ledger.get("job_1")
    assert (record.state, record.dead_letter, record.deaths, record.attempts) == ("queued", False, 0, 0)
    assert ledger.dead_letters("a").jobs == []
    for ask in (ledger.dead_letter, ledger.replay, ledger.delete_dead_letter):
        with pytest.raises(JobNotFound, match="no dead letter"):
            ask("job_1", "a")
    ledger.complete("job_1", claim(ledger, "again").fence, state="completed", response=b"{}")
    assert ledger.sweep(result_ttl_ms=1000).deleted == 0


def test_a_dead_letter_outlives_other_results_and_is_deleted_whole(ledger):
    die(ledger, "job_1")
    die(ledger, "job_2")
    submit(ledger, "job_3")
    ledger.complete("job_3", claim(ledger, "t").fence, state="failed", error={"code": "engine_error"})
    for name in ("finished", "dead"):
        for job_id in ledger.redis.zrange(f"{ledger.prefix}{name}", 0, -1):
            ledger.redis.zincrby(f"{ledger.prefix}{name}", -5000, job_id)
    assert ledger.sweep(result_ttl_ms=1000, dead_ttl_ms=60_000).deleted == 1
    assert [job.id for job in ledger.dead_letters("a").jobs] == ["job_2", "job_1"]
    ledger.delete_dead_letter("job_1", "a")
    assert ledger.sweep(result_ttl_ms=1000, dead_ttl_ms=2000).deleted == 1
    assert ledger.redis.keys(f"{ledger.prefix}tries:*") == ledger.redis.keys(f"{ledger.prefix}dead*") == []


def test_another_tenant_sees_no_dead_letter(ledger):
    die(ledger)
    for ask in (ledger.dead_letter, ledger.replay, ledger.delete_dead_letter):
        with pytest.raises(JobNotFound):
            ask("job_1", "b")


def test_a_poison_job_is_found_looked_into_replayed_and_deleted_over_http_and_by_command(
    fleet, tmp_path, monkeypatch, capsys
):
    worker = fleet.start_worker()
    cause = tmp_path / "cause"
    poison = fleet.submit(f"tokens=6 exit=3 {cause}")
    assert fleet.wait(poison).dead_letter
    with api_of_workers(fleet.redis_url, "test") as api, api.http() as http:
        run = shell(api, monkeypatch, capsys, tmp_path)
        listed = http.get("/v1/dead_letters").json()
        assert [job["id"] for job in listed["data"]] == [poison]
        assert listed["data"][0]["expires_at"] - listed["data"][0]["failed_at"] == 7 * 86400
        letter = http.get(f"/v1/dead_letters/{poison}").json()
        assert (letter["object"], letter["job"]["id"]) == ("dead_letter", poison)
        assert [(a["attempt"], a["outcome"]) for a in letter["attempts"]] == [(1, "lost"), (2, "lost"), (3, "lost")]
        assert {a["reason"] for a in letter["attempts"]} == {"the engine process exited with status 9"}
        assert letter["last_worker"] == letter["attempts"][-1]["worker"]
        assert str(worker.pid) in letter["last_worker"]

        shown = run("dead-letters", "show", poison).out
        assert "exited with status 9" in shown and letter["last_worker"] in shown
        assert poison in run("dead-letters", "list").out

        again = http.post(f"/v1/dead_letters/{poison}/replay")
        assert again.status_code == 202
        assert http.get(f"/v1/dead_letters/{poison}").status_code == 404
        until(lambda: fleet.wait(poison).dead_letter)
        assert run("dead-letters", "delete", poison, "--json").json["deleted"] is True
        assert http.get(f"/v1/jobs/{poison}").status_code == 404


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/dead_letters?limit=0", 422),
        ("GET", "/v1/dead_letters?limit=101", 422),
        ("GET", "/v1/dead_letters?state=x", 422),
        ("GET", "/v1/dead_letters?metadata[team]=a", 422),
        ("GET", "/v1/dead_letters?after=job_1", 404),
        ("GET", f"/v1/dead_letters/{NOWHERE}", 404),
        ("GET", "/v1/dead_letters/nothing", 404),
        ("POST", f"/v1/dead_letters/{NOWHERE}/replay", 404),
        ("DELETE", f"/v1/dead_letters/{NOWHERE}", 404),
    ],
)
def test_a_bad_question_about_dead_letters_is_a_typed_error(redis_url, method, path, status):
    with api_of_workers(redis_url, "test") as api, api.http() as http:
        answer = http.request(method, path)
    assert answer.status_code == status
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_a_poison_job_takes_neither_its_mates_nor_the_other_model_s_jobs_with_it(fleet):
    fleet.start_worker({"m": "fake", "p": "image"})
    chats = [fleet.submit("tokens=60 step=0.02") for _ in range(3)]
    pictures = [fleet.paint("step=0.05", body={"num_inference_steps": 30}) for _ in range(3)]
    for job_id in chats:
        fleet.wait_for_words(job_id)
    until(lambda: all(fleet.ledger.get(job_id).progress for job_id in pictures))
    poison = fleet.paint("exit=2")
    assert fleet.wait(poison).dead_letter
    for job_id in chats:
        record = fleet.wait(job_id)
        # The other model's engine never stopped.
        assert (record.attempts, record.deaths) == (1, 0)
        assert_published_once(fleet.ledger, record, 60)
    records = [fleet.wait(job_id) for job_id in pictures]
    assert {(record.state, record.deaths) for record in records} == {("completed", 0)}
    # The poison died once in company, which cost nobody, and then alone.
    with fleet.client() as client:
        assert [job.id for job in client.dead_letters().jobs] == [poison]
        outcomes = [attempt.how for attempt in client.attempts(poison)]
        assert (outcomes[0], outcomes[-3:]) == ("crowd", ["lost"] * 3)
        assert client.replay(poison).id == poison
