"""Lines of every kind in batches: responses, pictures, edits, several models; and what of a line the queue sees."""

import io

import pytest
from fleet import until
from live_api import running_api
from live_batches import NullWorker, image_line, line, read_lines, response_line, running_batches, start, wait_for_end
from outbox_moves import URL
from PIL import Image

from inferfleet.tasks.contracts import data_url
from inferfleet.tasks.names import EDITS_URL

RESPONSES = "/v1/responses"


@pytest.fixture(scope="module")
def shared_api(session_redis):
    with (
        running_api(session_redis.url, served=("paper", "flux")) as api,
        running_batches(api.settings, api.worker.ring),
    ):
        yield api


@pytest.fixture
def ledger(api):
    return api.worker.ledger


def read(api, file_id):
    return {entry["custom_id"]: entry for entry in read_lines(api.sdk(), file_id)}


def test_lines_of_responses_are_answered_with_response_objects(api):
    lines = [response_line("whole", "say all is well", instructions="be short"),
             response_line("cut", "say two words", max_output_tokens=2),
             response_line("list", [{"role": "user", "content": "say a list"}]),
             response_line("streamed", stream=True), response_line("behind", background=True),
             response_line("hot", temperature=3.5), response_line("hooked", webhook=URL)]  # fmt: skip
    made = start(api.sdk(), lines, RESPONSES)
    batch = wait_for_end(api.sdk(), made.id)
    assert batch.request_counts.model_dump() == {"total": 7, "completed": 3, "failed": 4}
    output, errors = read(api, batch.output_file_id), read(api, batch.error_file_id)
    shown = {name: entry["response"]["body"] for name, entry in output.items()}
    assert {name: (body["object"], body["status"]) for name, body in shown.items()} == {
        "whole": ("response", "completed"), "cut": ("response", "incomplete"), "list": ("response", "completed")
    }  # fmt: skip
    assert shown["whole"]["output"][0]["content"][0]["text"] == "all is well"
    assert batch.usage.input_tokens == 9
    params = {name: entry["response"]["body"]["error"]["param"] for name, entry in errors.items()}
    assert params == {
        "streamed": "body.stream", "behind": "body.background", "hot": "body.temperature", "hooked": "webhook"
    }  # fmt: skip


def test_pictures_of_a_batch_can_be_fetched_until_long_after_its_window(api, ledger):
    made = start(api.sdk(), [image_line("a", n=2), image_line("b", response_format="b64_json")],
                 "/v1/images/generations", window="10d")  # fmt: skip
    batch = wait_for_end(api.sdk(), made.id)
    output = read(api, batch.output_file_id)
    pictures = output["a"]["response"]["body"]["data"]
    assert len(pictures) == 2
    ttl = round(api.settings.result_ttl_seconds)
    assert {picture["url_expires_at"] for picture in pictures} == {batch.expires_at + ttl}
    assert output["b"]["response"]["body"]["data"][0]["b64_json"]
    # the sweep leaves their job so long, and the one whose pictures are in the line is gone
    [job] = ledger.list("default", metadata={"batch_id": batch.id}).jobs
    ends = ledger.redis.zscore(f"{ledger.prefix}finished", job.id)
    assert round(ends / 1000) == pytest.approx(batch.expires_at, abs=1)
    with api.http() as http:
        path = pictures[0]["url"].partition("/v1/")[2]
        assert http.get(f"/v1/{path}").headers["content-type"] == "image/png"


def test_edits_are_lines_too(api):
    picture = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(picture, "PNG")
    given = {"model": "flux", "prompt": "warmer", "image": data_url(picture.getvalue(), "image/png")}
    made = start(api.sdk(), [{"custom_id": "e", "method": "POST", "url": EDITS_URL, "body": given}], EDITS_URL)
    batch = wait_for_end(api.sdk(), made.id)
    assert (batch.endpoint, batch.request_counts.completed) == (EDITS_URL, 1)
    assert read(api, batch.output_file_id)["e"]["response"]["body"]["data"][0]["url"].startswith("http://")


def test_one_file_may_name_several_models(api):
    # given workers of two models, and a file of lines for both in turn
    with NullWorker(api.settings.redis_url, api.settings.namespace) as other:
        lines = [line(f"{number}", model=("paper", "null")[number % 2]) for number in range(40)]
        batch = wait_for_end(api.sdk(), start(api.sdk(), lines).id)
    assert (batch.model, batch.request_counts.completed, len(other.answers)) == (None, 40, 20)
    models = {name: entry["response"]["body"].get("model") for name, entry in read(api, batch.output_file_id).items()}
    assert [models[str(number)] for number in range(0, 40, 2)] == ["paper"] * 20


def test_the_priority_of_a_line_is_its_own_its_tiers_or_the_batchs(api, ledger):
    wishes = {
        "own": {"priority": -100},
        "flex": {"service_tier": "flex"},
        "soon": {"service_tier": "priority"},
        "none": {},
        "auto": {"service_tier": "auto"},
    }
    lines = [line(name, "hold on", **wish) for name, wish in wishes.items()]
    made = start(api.sdk(), lines, extra_body={"priority": 100})
    jobs = until(lambda: len(found := ledger.list("default", metadata={"batch_id": made.id}).jobs) == 5 and found)
    # behind all online work, in the order that they name
    found = {job.custom_id: job.priority for job in jobs}
    assert found == {"own": 50, "soon": 62, "flex": 87, "none": 100, "auto": 100}
    api.sdk().batches.cancel(made.id)
    wait_for_end(api.sdk(), made.id)


def test_a_batch_may_name_a_tier_instead_of_a_priority(api):
    given = ({}, {"service_tier": "flex"}, {"service_tier": "priority", "priority": 3})
    made = [start(api.sdk(), [line("a")], extra_body=each) for each in given]
    assert [batch.x_fleet["priority"] for batch in made] == [0, 50, 3]
    for batch in made:
        wait_for_end(api.sdk(), batch.id)
