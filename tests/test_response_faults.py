"""A response in the background outlives everything: its worker, the API that took it, Redis, and its reader."""

import itertools
from contextlib import closing

import openai
import pytest
from fake_engine import answer
from fleet import Fleet, until
from live_api import api_of_workers

from inferfleet.tasks import names
from inferfleet.workers.flight import seed_of

TOKENS = 150
WORDS = f"tokens={TOKENS} step=0.03"


@pytest.fixture
def fleet(own_redis, tmp_path):
    with closing(Fleet(own_redis.url, tmp_path)) as fleet:
        yield fleet


def ask(api):
    return api.sdk().responses.create(model="m", input=WORDS, background=True).id


def read(api, response_id, after=-1, count=None):
    """Events behind `after`: as many as `count`, or to the end."""
    options = {} if after < 0 else {"starting_after": after}
    with api.sdk().responses.retrieve(response_id, stream=True, **options) as stream:
        return list(itertools.islice(stream, count))


def test_a_response_goes_on_after_the_death_of_worker_api_and_redis_and_is_read_whole(own_redis, fleet):
    fleet.start_worker()
    with api_of_workers(own_redis.url, "test") as api:
        response_id = ask(api)
        events = read(api, response_id, count=12)
    # When its reader has left, its API has ended, and its worker is killed
    fleet.workers[0].kill()
    fleet.start_worker()
    with api_of_workers(own_redis.url, "test") as api:
        events += read(api, response_id, events[-1].sequence_number, count=25)
        # and Redis
        own_redis.kill()
        own_redis.start()
        until(lambda: api.sdk(max_retries=5).responses.retrieve(response_id).status == "in_progress")
        events += read(api, response_id, events[-1].sequence_number)
        whole = api.sdk().responses.retrieve(response_id)
        # Then the pieces of the stream are one story, and it is what the response says
        assert [event.sequence_number for event in events] == list(range(len(events)))
        assert events[-1].type == "response.completed"
        said = "".join(event.delta for event in events if event.type == "response.output_text.delta")
        assert said == whole.output_text == answer(seed_of(names.job_of_response(response_id)), TOKENS)
        assert [event.model_dump() for event in read(api, response_id)] == [event.model_dump() for event in events]
    assert fleet.ledger.get(names.job_of_response(response_id)).deaths == 1


def test_a_response_is_stopped_and_forgotten_by_an_api_that_did_not_take_it(own_redis, fleet):
    fleet.start_worker()
    with api_of_workers(own_redis.url, "test") as api:
        response_id = ask(api)
        until(lambda: api.sdk().responses.retrieve(response_id).status == "in_progress")
    with api_of_workers(own_redis.url, "test") as api:
        responses = api.sdk().responses
        assert responses.cancel(response_id).status == "cancelled"
        assert [item.content[0].text for item in responses.input_items.list(response_id)] == [WORDS]
        responses.delete(response_id)
        with pytest.raises(openai.NotFoundError):
            responses.retrieve(response_id)
