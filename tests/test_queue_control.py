"""A model's queue as a whole: what waits in it, paused, resumed and purged, from the ledger to the command line."""

import contextlib

import pytest
from fleet import Fleet, until
from ledger_moves import claim, submit, types
from live_api import api_of_workers, running_api
from shell import shell

from inferfleet.tasks import queues
from inferfleet.tasks.errors import InvalidRequest
from inferfleet.tasks.ledger import Ledger
from inferfleet.workers.keys import digest, new_key

CHAT = {"model": "paper", "messages": [{"role": "user", "content": "say hi"}]}


def test_a_paused_queue_takes_jobs_and_gives_none_until_it_is_resumed(ledger):
    submit(ledger, "job_1")
    ledger.pause("m")
    submit(ledger, "job_2")
    assert claim(ledger, "t1") is None
    assert ledger.sweep(result_ttl_ms=1000).ring == {}
    assert ledger.get("job_1").eta_ms is None
    assert ledger.resume("m") == 2
    assert claim(ledger, "t2").job_id == "job_1"
    assert ledger.sweep(result_ttl_ms=1000).ring == {"m": 1}


def test_a_pause_lets_running_work_end_and_handed_back_work_wait(ledger):
    submit(ledger, "job_1")
    submit(ledger, "job_2")
    first, second = claim(ledger, "t1"), claim(ledger, "t2")
    ledger.pause("m")
    assert ledger.complete("job_1", first.fence, state="completed", response=b"{}") == "done"
    assert ledger.release("job_2", second.fence) == "released"
    assert claim(ledger, "t3") is None
    ledger.resume("m")
    assert claim(ledger, "t4").job_id == "job_2"


def test_a_second_pause_keeps_the_time_of_the_first_and_an_empty_paused_queue_is_not_forgotten(ledger):
    ledger.pause("m")
    (first,) = ledger.queues("m")
    ledger.pause("m")
    ledger.sweep(result_ttl_ms=1000)
    assert ledger.queues() == [first]
    assert first.paused_at is not None
    ledger.resume("m")
    ledger.sweep(result_ttl_ms=1000)
    assert ledger.queues() == []


def test_queues_count_by_model_and_tenant(ledger):
    submit(ledger, "job_1", tenant="a")
    submit(ledger, "job_2", tenant="b", priority=7)
    submit(ledger, "job_3", tenant="b", model="n", batch_id="batch_1")
    claim(ledger)
    m, n = ledger.queues()
    assert (m.model, m.waiting, m.running, m.tenants) == ("m", 1, 1, {"b": 1})
    assert (n.model, n.waiting, n.running, n.tenants) == ("n", 1, 0, {"b": 1})
    assert ledger.queues("n", "a")[0].tenants == {}
    assert ledger.queues("unheard-of")[0].waiting == 0


def test_a_purge_ends_what_waits_once_and_leaves_what_runs_or_is_anothers(ledger, monkeypatch):
    monkeypatch.setattr(queues, "CLEAR_STEP", 2)
    for number in range(7):
        submit(ledger, f"job_{number}", tenant="ab"[number % 2], webhook="https://receiver.example/hook")
    submit(ledger, "job_n", model="n")
    running = claim(ledger).job_id
    mine = ledger.purge("m", confirm="m", tenant="b")
    assert (mine.cancelled, mine.more) == (3, False)
    rest = ledger.purge("m", confirm="m")
    assert (rest.cancelled, rest.more) == (3, False)
    assert ledger.get(running).state == "in_progress"
    assert ledger.get("job_n").state == "queued"
    ended = [f"job_{number}" for number in range(7) if f"job_{number}" != running]
    assert {ledger.get(job_id).error["code"] for job_id in ended} == {"cancelled"}
    assert all(types(ledger, job_id)[1:] == ["job.cancelled"] for job_id in ended)
    deliveries = [d.subject for tenant in "ab" for d in ledger.list_deliveries(tenant, limit=100)[0]]
    assert sorted(deliveries) == ended
    assert ledger.purge("m", confirm="m").cancelled == 0


def test_a_purge_stops_at_its_limit_and_says_so(ledger):
    for number in range(5):
        submit(ledger, f"job_{number}")
    first = ledger.purge("m", confirm="m", limit=3)
    assert (first.cancelled, first.more) == (3, True)
    assert ledger.purge("m", confirm="m", limit=3).cancelled == 2


def test_jobs_that_come_during_a_purge_stay(ledger, monkeypatch):
    monkeypatch.setattr(queues, "CLEAR_STEP", 1)
    submit(ledger, "job_1")
    submit(ledger, "job_2")
    steps = queues.purge("m", confirm="m")
    call, answer = next(steps), None
    with contextlib.suppress(StopIteration):
        for number in range(3, 20):
            answer = ledger.run(call)
            submit(ledger, f"job_{number}")
            call = steps.send(answer)
    left = {job.id for job in ledger.list("a", status="queued").jobs}
    assert not {"job_1", "job_2"} & left
    assert "job_3" in left


def test_a_purge_without_the_models_name_is_refused(ledger):
    submit(ledger)
    with pytest.raises(InvalidRequest, match="confirm"):
        ledger.purge("m", confirm="n")
    assert ledger.get("job_1").state == "queued"


def test_pausing_resuming_and_purging_over_http_and_by_command(redis_url, tmp_path, monkeypatch, capsys):
    fleet = Fleet(redis_url, tmp_path)
    fleet.start_worker()
    try:
        with api_of_workers(redis_url, "test") as api, api.http() as http:
            run = shell(api, monkeypatch, capsys, tmp_path)
            # given a running job and a paused queue
            running = fleet.submit("tokens=60 step=0.02")
            fleet.wait_for_words(running)
            paused = http.post("/v1/queues/m/pause").json()
            assert (paused["object"], paused["paused"], paused["running"]) == ("queue", True, 1)
            # when jobs come, they wait, and the running one ends
            body = {"model": "m", "messages": [{"role": "user", "content": "tokens=1"}]}
            ids = [http.post("/v1/jobs", json={"body": body}).json()["id"] for _ in range(3)]
            assert fleet.wait(running).state == "completed"
            assert {fleet.state(job_id) for job_id in ids} == {"queued"}
            listed = run("queue", "list", "--json").json["data"]
            assert [(q["model"], q["queued"], q["tenants"]) for q in listed] == [("m", 3, {"default": 3})]
            assert "paused" in run("queue", "list").out
            # then a purge cancels them, and after a resume new ones run
            assert "3 jobs cancelled" in run("queue", "purge", "m", "--yes").out
            assert {fleet.state(job_id) for job_id in ids} == {"cancelled"}
            waiting = http.post("/v1/jobs", json={"body": body}).json()["id"]
            assert run("queue", "resume", "m").out.startswith("m is open")
            assert fleet.wait(waiting).state == "completed"
            with fleet.client() as client:
                client.pause("m")
                late = client.submit(body)
                assert client.queues()[0].waiting == 1
                assert client.purge("m", confirm="m").cancelled == 1
                client.resume("m")
                assert client.get(late.id).status == "cancelled"
                assert until(lambda: client.submit(body, wait=True).status == "completed")
    finally:
        fleet.close()


@pytest.fixture(scope="module")
def shared_api(session_redis):
    with running_api(session_redis.url) as api:
        yield api


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        ("GET", "/v1/queues/nothing", None, 404, "model_not_found"),
        ("GET", "/v1/queues/", None, 404, "model_not_found"),
        ("GET", "/v1/queues?state=x", None, 422, "invalid_request"),
        ("POST", "/v1/queues/nothing/pause", None, 404, "model_not_found"),
        ("POST", "/v1/queues//pause", None, 404, "model_not_found"),
        ("POST", "/v1/queues/a/b/resume", None, 404, "model_not_found"),
        ("POST", "/v1/queues/paper/purge", {}, 422, "invalid_request"),
        ("POST", "/v1/queues/paper/purge", {"confirm": "pape"}, 422, "invalid_request"),
        ("POST", "/v1/queues/paper/purge", {"confirm": "paper", "all": True}, 422, "invalid_request"),
        ("POST", "/v1/queues/nothing/purge", {"confirm": "nothing"}, 404, "model_not_found"),
    ],
)
def test_a_bad_question_about_queues_is_a_typed_error(http, method, path, body, status, code):
    answer = http.request(method, path, json=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)


def test_a_tenant_that_is_no_operator_sees_and_purges_its_own_jobs_alone(api):
    key = new_key()
    ledger = Ledger.from_url(api.settings.redis_url, api.settings.namespace)
    ledger.put_key(digest(key), "small", "a test")
    api.worker.paused = True
    with api.http() as operator, api.http(headers={"authorization": f"Bearer {key}"}) as small:
        theirs = operator.post("/v1/jobs", json={"body": CHAT}).json()["id"]
        own = small.post("/v1/jobs", json={"body": CHAT}).json()["id"]
        assert small.get("/v1/queues/paper").json()["tenants"] == {"small": 1}
        assert operator.get("/v1/queues/paper").json()["tenants"] == {"default": 1, "small": 1}
        for path, body in (("pause", None), ("resume", None), ("purge", {"confirm": "paper", "tenant": "default"})):
            refused = small.post(f"/v1/queues/paper/{path}", json=body)
            assert (refused.status_code, refused.json()["error"]["code"]) == (403, "forbidden")
        assert small.post("/v1/queues/paper/purge", json={"confirm": "paper"}).json()["cancelled"] == 1
        assert ledger.get(own).state == "cancelled"
        assert ledger.get(theirs).state == "queued"
        assert operator.post("/v1/queues/paper/purge", json={"confirm": "paper"}).json()["cancelled"] == 1
    ledger.close()
