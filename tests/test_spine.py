"""The whole product through its public door: `inferfleet up --demo`, the OpenAI SDK, the command line, curl-like HTTP.

One fleet serves all tests here: embedded Redis, API, Celery worker, two engine processes, the trained demo models.
"""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx2
import numpy as np
import openai
import psutil
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "ops"))

from demo_image_judge import look

PATIENCE = 180
#: Spread over all pairs; held-out ones have their own test (tests/test_demo_model.py).
ADDITIONS = list(itertools.islice(((a, b) for a in range(3, 100, 7) for b in range(2, 100, 5)), 0, None, 3))


@dataclass
class Up:
    """A running `inferfleet up --demo`."""

    url: str
    process: subprocess.Popen
    sdk: openai.OpenAI
    folder: Path

    def ask(self, words, **options):
        messages = [{"role": "user", "content": words}]
        return self.sdk.chat.completions.create(model="demo", messages=messages, **options)

    def text(self, words, **options):
        return self.ask(words, temperature=0, **options).choices[0].message.content

    def cli(self, *arguments):
        command = [sys.executable, "-m", "inferfleet.workers.cli", *arguments, "--api-url", self.url]
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=self.folder, timeout=PATIENCE)

    def engines(self):
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [child for child in children if "inferfleet.engine.process" in child.cmdline()]


def free_port():
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def up(tmp_path_factory):
    folder = tmp_path_factory.mktemp("up")
    url = f"http://127.0.0.1:{free_port()}"
    command = [sys.executable, "-m", "inferfleet.workers.cli", "up", "--demo", "--port", url.rpartition(":")[2]]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("INFERFLEET_")}
    with (folder / "up.log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "--data-dir", str(folder / "data")], stdout=log, stderr=log, cwd=folder, env=environment
        )
    try:
        deadline = time.monotonic() + PATIENCE
        while not is_ready(url):
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"the fleet did not come up:\n{(folder / 'up.log').read_text()[-3000:]}")
            time.sleep(0.2)
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=PATIENCE, max_retries=0) as sdk:
            yield Up(url, process, sdk, folder)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def is_ready(url):
    try:
        return httpx2.get(f"{url}/ready", trust_env=False, timeout=2).json().get("models") == ["demo", "demo-image"]
    except httpx2.TransportError:
        return False


def test_the_demo_model_adds_two_numbers_below_a_hundred(up):
    # When many clients ask at once through the API, then at least 95 % of the sums are right.
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda pair: up.text(f"What is {pair[0]} + {pair[1]}?"), ADDITIONS))
    right = sum(answer == str(a + b) for answer, (a, b) in zip(answers, ADDITIONS, strict=True))
    assert right >= 0.95 * len(ADDITIONS), f"{right} of {len(ADDITIONS)}"


def test_a_stream_tells_the_same_text_and_usage_as_the_whole_answer(up):
    whole = up.ask("Spell the word table.", temperature=0)
    stream = up.ask("Spell the word table.", temperature=0, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)

    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens > 1
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens > 1


def test_the_same_seed_gives_the_same_text_alone_and_in_a_crowd(up):
    def sampled(seed):
        return up.ask("Tell me something.", temperature=1.0, seed=seed, max_tokens=40, extra_body={"ignore_eos": True})

    alone = [sampled(seed).choices[0].message.content for seed in range(4)]
    with ThreadPoolExecutor(24) as pool:
        crowd = list(pool.map(lambda n: sampled(n % 4).choices[0].message.content, range(24)))

    assert crowd == [alone[n % 4] for n in range(24)]
    assert len(set(alone)) > 1


def test_a_job_goes_in_by_http_and_comes_out_by_the_command_line(up):
    line = {"custom_id": "sum", "method": "POST", "url": "/v1/chat/completions", "metadata": {"team": "a"}}
    line["body"] = {"model": "demo", "temperature": 0, "messages": [{"role": "user", "content": "What is 17 + 25?"}]}
    accepted = httpx2.post(f"{up.url}/v1/jobs", json=line, trust_env=False)

    waited = up.cli("jobs", "wait", accepted.json()["id"], "--json")
    listed = up.cli("jobs", "list", "--metadata", "team=a", "--json")

    assert accepted.status_code == 202
    job = json.loads(waited.stdout)
    assert (job["status"], job["custom_id"], job["attempts"]) == ("completed", "sum", 1)
    assert job["response"]["body"]["choices"][0]["message"]["content"] == "42"
    assert [entry["id"] for entry in json.loads(listed.stdout)["data"]] == [job["id"]]


def test_the_chat_command_prints_the_answer(up):
    done = up.cli("chat", "--temperature", "0", "What is 30 + 12?")
    assert (done.returncode, done.stdout.strip()) == (0, "42")


def test_the_image_command_paints_what_it_is_asked_for(up):
    answer = up.cli("image", "a red circle on a blue background", "-o", "circle.png", "--seed", "3")
    assert answer.returncode == 0, answer.stderr
    sight = look(np.asarray(Image.open(up.folder / "circle.png").convert("RGB")))
    assert (sight.colour, sight.shape, sight.background) == ("red", "circle", "blue")


def test_jobs_survive_the_death_of_the_engine_that_runs_them(up):
    # Given long jobs under way, when the engine processes are killed, then a fresh one ends each with the text that it
    # would have had anyway, and each has one terminal event.
    def body(seed):
        return {
            "model": "demo", "temperature": 1.0, "seed": seed, "max_tokens": 150, "ignore_eos": True,
            "messages": [{"role": "user", "content": "Tell me something."}],
        }  # fmt: skip

    with httpx2.Client(base_url=up.url, trust_env=False, timeout=PATIENCE) as http:
        ids = [http.post("/v1/jobs", json={"body": body(seed)}).json()["id"] for seed in range(6)]
        while http.get(f"/v1/jobs/{ids[0]}").json()["status"] == "queued":
            time.sleep(0.01)
        engines = up.engines()
        for engine in engines:
            engine.kill()
        jobs = [wait_for(http, job_id) for job_id in ids]
        repeated = [http.post("/v1/jobs", json={"body": body(seed)}).json()["id"] for seed in range(6)]
        again = [wait_for(http, job_id) for job_id in repeated]
        events = [http.get(f"/v1/jobs/{job_id}/events").text for job_id in ids]

    assert [job["status"] for job in jobs] == ["completed"] * 6
    assert [text_of(job) for job in jobs] == [text_of(job) for job in again]
    assert [log.count("event: job.completed") for log in events] == [1] * 6
    assert len(engines) == 2
    assert not any(engine.is_running() for engine in engines)


def wait_for(http, job_id):
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        job = http.get(f"/v1/jobs/{job_id}", params={"wait": 20}).json()
        if job["status"] in ("completed", "failed", "cancelled", "expired"):
            return job
    raise AssertionError(f"{job_id} did not end")


def text_of(job):
    return job["response"]["body"]["choices"][0]["message"]["content"]


def test_a_running_job_that_is_cancelled_stops_and_says_what_it_used(up):
    body = {"model": "demo", "max_tokens": 3500, "ignore_eos": True, "temperature": 1.0}
    body["messages"] = [{"role": "user", "content": "Tell me something."}]
    with httpx2.Client(base_url=up.url, trust_env=False, timeout=PATIENCE) as http:
        job_id = http.post("/v1/jobs", json={"body": body}).json()["id"]
        while http.get(f"/v1/jobs/{job_id}").json()["status"] == "queued":
            time.sleep(0.01)
        answer = http.post(f"/v1/jobs/{job_id}/cancel")
        job = wait_for(http, job_id)

    assert answer.status_code == 202
    assert job["status"] == "cancelled"
    assert 0 <= job["usage"]["completion_tokens"] < 3500


@pytest.mark.parametrize(
    ("change", "error", "param"),
    [
        ({"messages": [{"role": "user", "content": "word " * 9000}]}, openai.UnprocessableEntityError, "messages"),
        ({"model": "../../etc/passwd"}, openai.NotFoundError, "model"),
        ({"temperature": 9}, openai.UnprocessableEntityError, "temperature"),
        ({"max_tokens": 10**6}, openai.UnprocessableEntityError, "max_tokens"),
        ({"extra_body": {"temprature": 1}}, openai.UnprocessableEntityError, "temprature"),
    ],
)
def test_bad_input_is_refused_at_the_door_and_the_fleet_goes_on(up, change, error, param):
    call = {"model": "demo", "messages": [{"role": "user", "content": "hello"}], **change}
    with pytest.raises(error) as refused:
        up.sdk.chat.completions.create(**call)
    assert refused.value.body["param"] == param
    assert up.text("What is 2 + 3?") == "5"
