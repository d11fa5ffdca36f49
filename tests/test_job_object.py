"""How a job looks from outside, rendered from what the ledger holds."""

import json

import pytest
from ledger_moves import FAR, claim, submit

from inferfleet.tasks.errors import DeadlineExceeded, NotTerminal, WorkerLost
from inferfleet.tasks.job_object import to_job_object
from inferfleet.tasks.ledger import Ledger

ANSWER = {"id": "chatcmpl-1", "choices": [{"message": {"role": "assistant", "content": "4"}}]}


def completed(ledger: Ledger):
    options = {"custom_id": "cat-1", "metadata": {"team": "a"}, "priority": -3, "deadline_ms": FAR}
    submit(ledger, "job_00", **options)
    fence = claim(ledger).fence
    metrics = {"ttft_ms": 12.5, "load_ms": 0}
    end = {"state": "completed", "usage": {"total_tokens": 3}, "metrics": metrics}
    ledger.complete("job_00", fence, response=json.dumps(ANSWER).encode(), **end)
    return ledger.get("job_00")


def test_a_completed_job_has_exactly_the_documented_shape(ledger):
    record = completed(ledger)
    job = to_job_object(record, base_url="http://host", result_ttl_seconds=60).model_dump()
    ended = record.finished_ms // 1000
    metrics = job.pop("metrics")
    assert job == {
        "id": "job_00",
        "object": "job",
        "custom_id": "cat-1",
        "status": "completed",
        "endpoint": "/v1/chat/completions",
        "model": "m",
        "created_at": record.created_ms // 1000,
        "started_at": record.started_ms // 1000,
        "completed_at": ended,
        "failed_at": None,
        "cancelled_at": None,
        "expires_at": ended + 60,
        "deadline": FAR // 1000,
        "priority": -3,
        "queue_position": None,
        "eta_seconds": None,
        "progress": 100,
        "progress_detail": None,
        "attempts": 1,
        "max_attempts": 3,
        "dead_letter": False,
        "response": {"status_code": 200, "request_id": "req_00", "body": ANSWER},
        "error": None,
        "outputs": [],
        "usage": {"total_tokens": 3},
        "metadata": {"team": "a"},
        "urls": {
            "self": "http://host/v1/jobs/job_00",
            "events": "http://host/v1/jobs/job_00/events",
            "cancel": "http://host/v1/jobs/job_00/cancel",
            "result": "http://host/v1/jobs/job_00/result",
        },
    }
    assert metrics == {
        "queue_ms": record.started_ms - record.created_ms,
        "load_ms": 0,
        "ttft_ms": 12.5,
        "execution_ms": record.finished_ms - record.claimed_ms,
    }


def test_a_job_shows_its_answer_or_raises_its_error(ledger):
    assert to_job_object(completed(ledger)).text == "4"
    submit(ledger, "job_1", deadline_ms=1)
    with pytest.raises(NotTerminal):
        to_job_object(ledger.get("job_1")).result()
    ledger.sweep(result_ttl_ms=60_000)
    with pytest.raises(DeadlineExceeded, match="deadline"):
        to_job_object(ledger.get("job_1")).result()


def test_a_dead_letter_says_so(ledger):
    submit(ledger)
    ledger.lose("job_1", claim(ledger).fence, max_deaths=1)
    job = to_job_object(ledger.get("job_1"), max_attempts=1)
    assert (job.status, job.dead_letter, job.attempts, job.max_attempts) == ("failed", True, 1, 1)
    assert job.failed_at is not None
    with pytest.raises(WorkerLost):
        job.result()


def test_a_waiting_job_shows_its_place_and_when_its_turn_comes_once_a_pace_is_known(ledger):
    for i in range(4):
        submit(ledger, f"job_{i}")
    assert to_job_object(ledger.get("job_3")).eta_seconds is None
    # given one job that ended after half a second, long after any other
    ledger.redis.hset(f"{ledger.prefix}pace:m", mapping={"last": 1, "gap": 500})
    fence = claim(ledger).fence
    ledger.redis.hincrby(f"{ledger.prefix}job:job_0", "claimed_ms", -500)
    ledger.complete("job_0", fence, state="completed", response=b"{}")
    claim(ledger, "t1")
    job = to_job_object(ledger.get("job_3"))
    # then the pace is that half second, and the idle years count for nothing
    assert job.queue_position == 1
    assert 1.0 <= job.eta_seconds < 60


OUTPUT = {"id": "out_1", "index": 0, "content_type": "image/png", "size_bytes": 3, "hash": "sha256:00", "width": 16,
          "height": 32, "seed": 7}  # fmt: skip


def test_a_running_job_shows_how_far_it_is_and_a_completed_one_its_files(ledger):
    submit(ledger)
    fence = claim(ledger).fence
    ledger.publish("job_1", fence, [{"type": "job.progress", "step": 2, "steps": 3}], "t")
    job = to_job_object(ledger.get("job_1"))
    assert (job.progress, job.progress_detail.step, job.progress_detail.steps) == (66, 2, 3)
    # when it completes
    ledger.complete("job_1", fence, state="completed", outputs=[OUTPUT])
    record = ledger.get("job_1")
    assert [output.model_dump() for output in to_job_object(record).outputs] == [
        OUTPUT | {"url": None, "url_expires_at": None}
    ]
    assert to_job_object(record).progress == 100
