"""The whole way under the API with our own engine: ledger, Celery, worker, engine process, answer."""

import json
from pathlib import Path

import pytest
import torch
from fleet import deltas
from parity.checkpoints.writing import write

from inferfleet.engine.offline import LLM
from inferfleet.engine.sampling_params import SamplingParams

DEMO_MODEL = Path(__file__).parents[1] / "ops" / "demo_model"
SMALL = {"dtype": "float32", "device": "cpu", "max_model_len": 256, "kv_cache_tokens": 4096, "threads": 1}
#: A step may take long on a busy machine, and no lease shall lapse meanwhile.
CALM = {"lease_seconds": 60, "heartbeat_seconds": 1, "stall_seconds": 600}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen3")
    write("qwen3", 1, folder)
    return folder


@pytest.fixture(scope="module")
def offline(folder):
    torch.set_num_threads(1)
    return LLM(folder, **SMALL)


def messages(words):
    return [{"role": "user", "content": words}]


def answers_of(record):
    return [choice["message"]["content"] for choice in json.loads(record.response)["choices"]]


def test_a_fleet_answers_like_the_offline_engine_batched_and_seeded(fleet, folder, offline):
    fleet.start_worker(models={"tiny": {"path": str(folder), **SMALL}}, real=True, **CALM)
    sampled = {"temperature": 1.0, "max_tokens": 24, "ignore_eos": True}

    jobs = [fleet.submit(f"question {n}", model="tiny", body={"seed": n, "n": 2, **sampled}) for n in range(12)]
    records = [fleet.wait(job_id) for job_id in jobs]

    for n, record in enumerate(records):
        output = offline.chat(messages(f"question {n}"), SamplingParams(seed=n, n=2, **sampled))[0]
        assert answers_of(record) == [answer.text for answer in output.outputs]
        assert record.usage["completion_tokens"] == 48
        assert record.usage["prompt_tokens"] == len(output.prompt_token_ids)


def test_a_sampled_answer_is_the_same_after_its_engine_was_killed_in_the_middle(fleet, folder, offline):
    worker = fleet.start_worker(models={"tiny": {"path": str(folder), **SMALL}}, real=True, **CALM)
    sampled = {"temperature": 1.0, "max_tokens": 200, "ignore_eos": True}

    job_id = fleet.submit("tell me everything", model="tiny", body={"seed": 11, **sampled})
    fleet.wait_for_words(job_id, 2)
    worker.engines()[0].kill()
    record = fleet.wait(job_id)

    expected = offline.chat(messages("tell me everything"), SamplingParams(seed=11, **sampled))[0].outputs[0]
    assert record.deaths == 1
    assert answers_of(record) == [expected.text]
    said = deltas(fleet.ledger.events(job_id))
    assert [token for event in said for token in event["token_ids"]] == expected.token_ids
    assert "".join(event["delta"] for event in said) == expected.text


def test_the_shipped_model_adds_up(fleet):
    fleet.start_worker(models={"demo": {"path": str(DEMO_MODEL), "threads": 1}}, real=True, **CALM)

    sums = [(12, 30), (7, 8), (45, 54), (60, 21)]
    jobs = [fleet.submit(f"What is {a} + {b}?", model="demo", body={"temperature": 0.0}) for a, b in sums]
    records = [fleet.wait(job_id) for job_id in jobs]

    assert [str(a + b) in answers_of(record)[0] for (a, b), record in zip(sums, records, strict=True)] == [True] * 4
    assert {json.loads(record.response)["choices"][0]["finish_reason"] for record in records} == {"stop"}


@pytest.mark.slow
def test_a_hundred_sampled_answers_are_the_same_although_a_worker_and_an_engine_were_killed(fleet):
    models = {"demo": {"path": str(DEMO_MODEL), "threads": 1}}
    patient = {"lease_seconds": 6, "heartbeat_seconds": 1, "stall_seconds": 600}
    victim, steady = [fleet.start_worker(models=models, real=True, **patient) for _ in range(2)]
    sampled = {"temperature": 1.0, "max_tokens": 120, "ignore_eos": True}

    jobs = [fleet.submit(f"Spell the word number {n}", model="demo", body={"seed": n, **sampled}) for n in range(100)]
    fleet.wait_for_words(jobs[60])
    victim.kill()
    steady.engines()[0].kill()
    records = [fleet.wait(job_id, seconds=240) for job_id in jobs]

    offline = LLM(str(DEMO_MODEL), threads=1)
    params = [SamplingParams(seed=n, **sampled) for n in range(100)]
    chats = [messages(f"Spell the word number {n}") for n in range(100)]
    assert [answers_of(record)[0] for record in records] == [
        output.outputs[0].text for output in offline.chat(chats, params)
    ]
    assert sum(record.attempts > 1 for record in records) > 10
