"""Two ranks behind the engine process and behind a worker: who dies takes whom along, and no job is lost by it."""

import json
import os
import signal

import psutil
import pytest
from engine_child import PATIENCE, Child
from fleet import Fleet, until
from parity.checkpoints.writing import write

from inferfleet.engine.offline import LLM
from inferfleet.engine.sampling_params import SamplingParams

SPLIT = {"tensor_parallel_size": 2, "max_model_len": 256, "kv_cache_tokens": 4096, "dtype": "float32", "device": "cpu"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen3")
    write("qwen3", 0, folder)
    return folder


@pytest.fixture
def child(folder, tmp_path):
    """An engine of two ranks; its log is in tmp_path."""
    with (tmp_path / "log").open("wb") as stderr:
        child = Child(stderr)
        assert child.load(folder, tensor_parallel_size=2)["card"]["tensor_parallel_size"] == 2
        yield child
        child.kill()


def follower_of(process):
    (follower,) = psutil.Process(process.pid).children()
    assert "inferfleet.engine.follower" in follower.cmdline()
    return follower


def test_a_follower_killed_while_nothing_runs_ends_the_engine_process(child, tmp_path):
    follower = follower_of(child.process)
    follower.kill()
    assert child.process.wait(PATIENCE) == 1
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    (gone,) = [line for line in lines if line["event"] == "a rank is gone"]
    assert (gone["rank"], gone["pid"]) == (1, follower.pid)
    assert gone["reason"].endswith("was ended by SIGKILL")


@pytest.mark.slow
def test_a_follower_killed_under_load_ends_the_engine_process(child):
    follower = follower_of(child.process)
    child.add("endless", sampling={"max_tokens": 240})
    child.receive()
    follower.kill()
    assert child.process.wait(PATIENCE) == 1
    assert not follower.is_running()


@pytest.mark.parametrize("busy", [pytest.param(False, marks=pytest.mark.slow), True])
def test_followers_end_with_a_killed_rank_0(child, busy):
    follower = follower_of(child.process)
    if busy:
        child.add("endless", sampling={"max_tokens": 240})
        child.receive()
    child.process.send_signal(signal.SIGKILL)
    until(lambda: not follower.is_running(), PATIENCE)


def test_ctrl_c_leaves_both_ranks_at_work_and_stop_ends_both(child):
    follower = follower_of(child.process)
    for pid in (child.process.pid, follower.pid):
        os.kill(pid, signal.SIGINT)
    child.add("still here")
    assert child.until_end("still here")[0]["still here"]["reason"] == "length"
    child.send("stop")
    assert child.process.wait(PATIENCE) == 0
    assert not follower.is_running()


def test_jobs_of_a_split_engine_outlive_its_follower(folder, redis_url, tmp_path):
    # Given a worker whose model lies in two processes, and jobs that it writes at,
    fleet = Fleet(redis_url, tmp_path)
    calm = {"lease_seconds": 60, "heartbeat_seconds": 1, "stall_seconds": 600}
    sampled = {"temperature": 1.0, "max_tokens": 60, "ignore_eos": True}
    try:
        worker = fleet.start_worker(models={"tiny": {"path": str(folder), "threads": 2, **SPLIT}}, real=True, **calm)
        jobs = [fleet.submit(f"question {n}", model="tiny", body={"seed": n, **sampled}) for n in range(4)]
        fleet.wait_for_words(jobs[0], 2)
        engine = worker.engines()[0]
        follower = follower_of(engine)
        # when the follower is killed,
        follower.kill()
        records = [fleet.wait(job_id) for job_id in jobs]
        # then the engine ends and another pair ends every job, with the text that one process writes.
        assert not engine.is_running() and not follower.is_running()
        assert worker.lines("engine_died") and len(worker.lines("engine_ready")) == 2
        one = LLM(folder, **SPLIT | {"tensor_parallel_size": 1, "threads": 1})
        for n, record in enumerate(records):
            chat = [{"role": "user", "content": f"question {n}"}]
            expected = one.chat(chat, SamplingParams(seed=n, **sampled))[0].outputs[0].text
            assert json.loads(record.response)["choices"][0]["message"]["content"] == expected
        pair = [worker.engines()[0], follower_of(worker.engines()[0])]
        worker.kill()
        until(lambda: not any(process.is_running() for process in pair))
    finally:
        fleet.close()
