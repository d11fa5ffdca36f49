"""Keys, health, metrics, the OpenAPI document, and a Redis that goes away."""

import json
import threading
from collections.abc import Iterator

import openai
import pytest
from conftest import RedisServer
from live_api import LiveApi, running_api

from inferfleet.tasks.settings import Settings
from inferfleet.workers.api.auth import NoApiKey
from inferfleet.workers.api.server import serve
from inferfleet.workers.keys import digest, new_key

BODY = {"model": "paper", "messages": [{"role": "user", "content": "say hi"}]}


@pytest.fixture(scope="module")
def shared_api(session_redis) -> Iterator[LiveApi]:
    with running_api(session_redis.url) as api:
        yield api


def test_health_and_readiness_are_told(http):
    assert http.get("/health").json() == {"status": "ok"}
    assert http.get("/ready").json() == {"status": "ready", "models": ["paper"]}


def test_models_are_listed_as_the_sdk_expects_with_their_status(api):
    listed = api.sdk().models.list().data
    one = api.sdk().models.retrieve("paper")

    assert [model.id for model in listed] == ["paper"]
    assert (one.object, one.status, one.max_model_len) == ("model", "ready", 4096)
    with pytest.raises(openai.NotFoundError):
        api.sdk().models.retrieve("a/b")


def test_stats_count_what_waits_and_runs_by_model(api, http):
    api.worker.paused = True
    for _ in range(3):
        http.post("/v1/jobs", json={"body": BODY})

    paper = http.get("/v1/stats").json()["models"]["paper"]

    assert (paper["waiting"], paper["running"], paper["backlog"]) == (3, 0, 3)
    assert paper["oldest_age_s"] >= 0


def test_metrics_are_read_from_the_ledger_at_scrape_time(api, http):
    http.get("/v1/models")
    waiting = api.worker.ledger.stats().get("paper", {}).get("waiting", 0)

    page = http.get("/metrics")

    assert page.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert f'inferfleet_queue_depth{{model_name="paper"}} {float(waiting)}' in page.text
    assert 'inferfleet_model_loaded{model_name="paper"} 1.0' in page.text
    assert "inferfleet_ledger_up 1.0" in page.text
    assert 'inferfleet_http_requests_total{method="GET",route="/v1/models",status="200"}' in page.text


def test_a_path_with_an_id_in_it_makes_no_series_of_its_own(http):
    http.get("/v1/jobs/job_" + "0" * 32)
    http.get("/nowhere/at/all")

    page = http.get("/metrics").text

    assert 'route="/v1/jobs/{job_id}"' in page
    assert "job_000" not in page
    assert "/nowhere" not in page


def test_the_openapi_document_describes_bodies_and_answers(http):
    document = http.get("/openapi.json").json()
    chat = document["paths"]["/v1/chat/completions"]["post"]

    body = chat["requestBody"]["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
    assert document["components"]["schemas"][body]["properties"]["temperature"]
    assert {"200", "202", "422", "429", "503"} <= set(chat["responses"])
    text = json.dumps(document)
    refs = {part.split('"')[0] for part in text.split('"$ref": "#/components/schemas/')[1:]}
    assert refs <= set(document["components"]["schemas"])


def test_every_route_of_the_document_names_its_success_and_its_errors(http):
    document = http.get("/openapi.json").json()
    for path, methods in document["paths"].items():
        for method, route in methods.items():
            assert any(status.startswith("2") for status in route["responses"]), f"{method} {path}"
            if path.startswith("/v1/"):
                assert "503" in route["responses"], f"{method} {path}"


def test_the_docs_page_needs_nothing_from_elsewhere(http):
    page = http.get("/docs").text

    assert "/v1/jobs/{job_id}/events" in page
    assert "http://" not in page
    assert "https://" not in page
    assert "<script" not in page


# Keys ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def guarded(session_redis) -> Iterator[LiveApi]:
    """An API that believes it can be reached from elsewhere."""
    with running_api(session_redis.url, api_host="0.0.0.0") as api:
        yield api


def key_of(api: LiveApi, tenant: str) -> str:
    key = new_key()
    api.worker.ledger.put_key(digest(key), tenant, "a test")
    return key


def test_beyond_loopback_every_route_of_jobs_needs_a_key(guarded):
    with guarded.http() as http:
        for path in ("/v1/models", "/v1/jobs", "/v1/stats", "/metrics"):
            answer = http.get(path)
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "unauthorized")
            assert answer.headers["www-authenticate"] == "Bearer"
        assert http.get("/health").status_code == 200
        assert http.get("/ready").status_code == 200


def test_a_key_opens_the_api_until_it_is_deleted(guarded):
    key = key_of(guarded, "acme")
    assert guarded.sdk(api_key=key).chat.completions.create(**BODY).choices[0].message.content == "hi"

    guarded.worker.ledger.delete_key(digest(key))

    with pytest.raises(openai.AuthenticationError):
        guarded.sdk(api_key=key).models.list()


def test_a_tenant_never_sees_another_tenants_job(guarded):
    owner = {"Authorization": f"Bearer {key_of(guarded, 'acme')}"}
    other = {"Authorization": f"Bearer {key_of(guarded, 'umbrella')}"}
    with guarded.http() as http:
        job = http.post("/v1/jobs", json={"body": BODY}, headers=owner).json()["id"]

        for call in ("GET ", "GET /events", "GET /result", "POST /cancel", "POST /retry", "DELETE "):
            method, path = call.split(" ")
            answer = http.request(method, f"/v1/jobs/{job}{path}", headers=other)
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "job_not_found"), call
        assert http.get("/v1/jobs", headers=other).json()["data"] == []
        assert [entry["id"] for entry in http.get("/v1/jobs", headers=owner).json()["data"]] == [job]


def test_the_same_idempotency_key_of_two_tenants_makes_two_jobs(guarded):
    guarded.worker.paused = True
    ids = set()
    with guarded.http() as http:
        for tenant in ("acme", "umbrella"):
            headers = {"Authorization": f"Bearer {key_of(guarded, tenant)}", "Idempotency-Key": "same"}
            ids.add(http.post("/v1/jobs", json={"body": BODY}, headers=headers).json()["id"])

    assert len(ids) == 2


def test_a_tenant_looks_up_its_own_keys_alone(guarded):
    guarded.worker.paused = True
    asked = {"idempotency_keys": ["shared"]}
    owner, other = ({"Authorization": f"Bearer {key_of(guarded, tenant)}"} for tenant in ("acme", "umbrella"))
    with guarded.http() as http:
        job = http.post("/v1/jobs", json={"body": BODY}, headers=owner | {"Idempotency-Key": "shared"}).json()["id"]
        answers = [http.post("/v1/jobs/lookup", json=asked, headers=headers) for headers in (owner, other, {})]

    assert [answer.status_code for answer in answers] == [200, 200, 401]
    assert [answer.json()["data"][0]["job_id"] for answer in answers[:2]] == [job, None]


def test_on_loopback_a_placeholder_key_passes_and_a_wrong_one_of_ours_does_not(api):
    assert api.sdk(api_key="none").models.list().data
    with pytest.raises(openai.AuthenticationError):
        api.sdk(api_key=new_key()).models.list()


def test_the_ledger_holds_no_key_in_clear(guarded):
    key = key_of(guarded, "acme")

    stored = guarded.worker.ledger.redis.hgetall(f"{guarded.worker.ledger.prefix}keys")

    assert key not in str(stored)
    assert digest(key) in str(stored)


def test_the_api_does_not_start_beyond_loopback_without_any_key(redis_url):
    settings = Settings(redis_url=redis_url, api_host="0.0.0.0", api_port=0, allow_unsafe_redis=True)

    with pytest.raises(NoApiKey, match="keys create"):
        serve(settings, lambda model, times: None)


# A Redis that goes away ----------------------------------------------------------------------------------------------


def test_without_redis_requests_are_503_and_the_process_stays_healthy(own_redis: RedisServer):
    with running_api(own_redis.url) as api, api.http() as http:
        own_redis.kill()
        for method, path in (
            ("GET", "/v1/jobs"),
            ("GET", "/ready"),
            ("GET", "/v1/models"),
            ("POST", "/v1/chat/completions"),
        ):
            answer = http.request(method, path, json=BODY if method == "POST" else None)
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "ledger_unavailable"), path
            assert int(answer.headers["retry-after"]) >= 1
        assert http.get("/health").status_code == 200
        assert "inferfleet_ledger_up 0.0" in http.get("/metrics").text
        own_redis.start()


def test_a_stream_goes_on_after_redis_was_restarted(own_redis: RedisServer):
    # Given a stream that waits for its next words, when Redis is killed and started again on its append-only file,
    with running_api(own_redis.url) as api:
        stream = api.sdk().chat.completions.create(
            model="paper", messages=[{"role": "user", "content": "hold on"}], stream=True
        )
        assert next(stream).choices[0].delta.role == "assistant"
        job = api.worker.ledger.list("default").jobs[0].id
        own_redis.kill()
        own_redis.start()

        # then the end of the job still reaches the client.
        threading.Thread(target=api.worker.ledger.cancel, args=(job,)).start()
        with pytest.raises(openai.APIError, match="cancelled"):
            list(stream)
