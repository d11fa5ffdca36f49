"""`inferfleet batch` and `inferfleet files` as a shell calls them: a live API, a runner, and a worker by hand."""

import io
import json
import re
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
from chaosproxy import ChaosProxy
from fleet import until
from live_api import running_api
from live_batches import jsonl, line, running_batches
from rich.console import Console
from shell import Ran

from inferfleet.workers import cli_batch_run
from inferfleet.workers.cli_batch_run import view_for_stderr

LINES = [line(f"{number}", f"say answer {number}") for number in range(20)]


@pytest.fixture(scope="module")
def shared_api(session_redis):
    with running_api(session_redis.url) as api, running_batches(api.settings, api.worker.ring):
        yield api


@pytest.fixture
def work(run, tmp_path):
    """work(*lines) writes them to work.jsonl, where `run` runs."""

    def write(*lines):
        (tmp_path / "work.jsonl").write_bytes(jsonl(lines or LINES))

    write()
    return write


@pytest.fixture
def proxy(api):
    """A way to the API that can lose its answers."""
    with ChaosProxy(int(api.url.rpartition(":")[2])) as proxy:
        yield proxy


def through(proxy):
    return ("--api-url", f"http://127.0.0.1:{proxy.port}")


def read(path):
    return [json.loads(raw) for raw in path.read_bytes().splitlines()]


def ids(lines):
    return sorted((entry["custom_id"] for entry in lines), key=lambda word: (len(word), word))


def go_on(api):
    """The worker takes what waits again."""
    api.worker.renew()
    api.worker.ring("paper", 1)


def batches(run):
    return run("batch", "list", "--limit", "100", "--json").json["data"]


def started(run, *more):
    return run("batch", "create", "work.jsonl", *more).out.strip()


# run -----------------------------------------------------------------------------------------------------------------


def test_a_file_of_requests_becomes_a_file_of_answers(run, work, tmp_path):
    ran = run("batch", "run", "work.jsonl")

    assert ran.code == 0, ran.err
    assert "completed\n20 of 20 answered  work.output.jsonl\n0 in the error file  work.errors.jsonl\n" in ran.out
    assert re.fullmatch(r"(batch_\w+ [a-z_]+\n)+", ran.err)
    answers = read(tmp_path / "work.output.jsonl")
    assert ids(answers) == [f"{number}" for number in range(20)]
    said = {entry["custom_id"]: entry["response"]["body"]["choices"][0]["message"]["content"] for entry in answers}
    assert said["7"] == "answer 7"
    assert (tmp_path / "work.errors.jsonl").read_bytes() == b""
    assert not (tmp_path / "work.output.jsonl.batch").exists()


def test_lines_that_fail_go_to_the_other_file_and_are_told_by_the_exit_code(run, work, tmp_path):
    work(line("good"), line("bad", "fail engine_error"), line("hot", temperature=9))
    ran = run("batch", "run", "work.jsonl", "-o", "a.jsonl", "--errors", "b.jsonl", "--metadata", "team=a", "--json")

    assert (ran.code, ran.json["status"], ran.json["metadata"]) == (5, "completed", {"team": "a"})
    assert (ids(read(tmp_path / "a.jsonl")), ids(read(tmp_path / "b.jsonl"))) == (["good"], ["bad", "hot"])


def test_a_run_that_was_broken_off_goes_on_with_its_batch(run, work, api, tmp_path, monkeypatch):
    # Given a run that is left with Ctrl-C while its batch waits for a worker
    api.worker.paused = True
    before = len(batches(run))

    def interrupt(_seconds):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(cli_batch_run, "time", SimpleNamespace(sleep=interrupt, monotonic=lambda: 0.0))
        left = run("batch", "run", "work.jsonl")
    assert (left.code, "the batch goes on" in left.err) == (130, True)
    # when the same command is given again
    go_on(api)
    ran = run("batch", "run", "work.jsonl")
    # then it is the same batch, and everything is there
    assert (ran.code, len(batches(run)) - before) == (0, 1)
    assert "going on with batch_" in ran.err
    assert len(read(tmp_path / "work.output.jsonl")) == 20


def test_a_run_that_was_killed_goes_on_with_its_batch(run, work, api, tmp_path):
    # Given the program itself, killed while its batch waits for a worker
    api.worker.paused = True
    program = [sys.executable, "-m", "inferfleet.workers.cli", "batch", "run", "work.jsonl"]
    state = tmp_path / "work.output.jsonl.batch"
    with subprocess.Popen(program, cwd=tmp_path, stderr=subprocess.DEVNULL) as process:
        batch = until(lambda: state.exists() and json.loads(state.read_text())["batch_id"])
        process.kill()
    # when the same command is given again, then it is the same batch
    go_on(api)
    assert run("batch", "run", "work.jsonl", "--json").json["id"] == batch
    assert (len(read(tmp_path / "work.output.jsonl")), state.exists()) == (20, False)


@pytest.mark.parametrize("lost", ["upload", "batch"])
def test_a_lost_answer_breaks_a_run_off_and_makes_nothing_twice(run, work, proxy, tmp_path, monkeypatch, lost):
    files, made = (len(run(group, "list", "--limit", "100", "--json").json["data"]) for group in ("files", "batch"))
    # Given a run that hears nothing of its upload, or of its batch
    send = cli_batch_run.send_file

    def send_and_lose(*args, **kwargs):
        file = send(*args, **kwargs)
        proxy.lose_next_reply()
        return file

    with monkeypatch.context() as patched:
        if lost == "batch":
            patched.setattr(cli_batch_run, "send_file", send_and_lose)
        else:
            proxy.lose_next_reply()
        broken = run("batch", "run", "work.jsonl", *through(proxy))
    assert (broken.code, proxy.lost) == (3, 1)
    assert "api_unreachable" in broken.err
    # when it is run again, then there is one batch, of one upload
    ran = run("batch", "run", "work.jsonl", *through(proxy))
    assert ran.code == 0, ran.err
    assert len(batches(run)) - made == 1
    assert len(run("files", "list", "--limit", "100", "--json").json["data"]) - files == 2  # its input and its output


def test_another_input_does_not_take_the_place_of_a_run_that_was_broken_off(run, work, api, tmp_path):
    api.worker.paused = True
    run("batch", "run", "work.jsonl", "--api-url", "http://127.0.0.1:9")
    work(line("another"))
    ran = run("batch", "run", "work.jsonl")

    assert ran.code == 1
    assert all(
        word in ran.err for word in ("work.output.jsonl.batch", "another input", "other_batch", "remove the file")
    )


def test_what_is_refused_at_the_door_leaves_nothing_to_go_on_with(run, work, tmp_path):
    refused = run("batch", "run", "work.jsonl", "--window", "99y")

    assert (refused.code, "completion_window" in refused.err) == (1, True)
    assert [path.name for path in tmp_path.iterdir()] == ["work.jsonl"]


def test_an_input_that_is_no_batch_is_told_line_by_line(run, work, tmp_path):
    work(line("a"), line("a"), {"custom_id": "b", "method": "GET"})
    ran = run("batch", "run", "work.jsonl")

    assert (ran.code, ran.out) == (5, "")
    assert re.search(r"line 2: .*\(custom_id\)", ran.err) and "line 3: " in ran.err
    assert [path.name for path in tmp_path.iterdir()] == ["work.jsonl"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("absent.jsonl",), "does not exist"),
        (("work.jsonl", "-o", "no/such/folder.jsonl"), "there is no folder no/such"),
        (("work.jsonl", "-o", "work.jsonl"), "work.jsonl is the input"),
        (("work.jsonl", "-o", "x", "--errors", "x"), "go to two files"),
        (("work.jsonl", "--metadata", "x"), "is not KEY=VALUE"),
        (("empty.jsonl",), "give --endpoint"),
    ],
)
def test_a_wrong_command_line_is_refused_before_anything_is_sent(run, work, tmp_path, arguments, words):
    (tmp_path / "empty.jsonl").touch()
    before = len(batches(run))
    ran = run("batch", "run", *arguments)

    assert (ran.code, words in re.sub(r"[│\s]+", " ", ran.err)) == (2, True), ran.err
    assert len(batches(run)) == before


def test_a_wait_outlives_an_api_that_is_away_for_a_moment(run, work, api, proxy):
    api.worker.paused = True
    batch = started(run)

    def away_and_back():
        proxy.reset_all()
        proxy.lose_next_reply(3)
        go_on(api)

    timer = threading.Timer(0.5, away_and_back)
    timer.start()
    ran = run("batch", "wait", batch, "--json", *through(proxy))
    timer.join()

    assert (ran.code, ran.json["status"]) == (0, "completed")
    assert proxy.lost >= 1


def test_a_terminal_shows_how_many_lines_have_ended(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(cli_batch_run, "err", Console(file=screen, force_terminal=True, width=100))
    with view_for_stderr() as view:
        for status, completed, failed in (("validating", 0, 0), ("in_progress", 6, 1)):
            counts = {"total": 20 if completed else 0, "completed": completed, "failed": failed}
            view.show({"id": "batch_1", "status": status, "request_counts": counts})

    assert "in progress, 1 failed" in screen.getvalue()
    assert "7/20" in screen.getvalue()


# The rest ------------------------------------------------------------------------------------------------------------


def test_batches_are_created_listed_shown_and_waited_for(run, work):
    file = run("files", "upload", "work.jsonl").out.strip()
    first = started(run, "--priority", "5")
    second = run("batch", "create", file, "--endpoint", "/v1/chat/completions", "--window", "1h").out.strip()
    waited = run("batch", "wait", second)

    assert (waited.code, run("batch", "wait", first).code) == (0, 0)
    assert re.search(r"lines\s+20: 20 answered, 0 failed", waited.out)
    listed = run("batch", "list", "--limit", "2").out
    assert re.search(rf"{second}\s+completed\s+20\s+20\s+0\s+\w+\s+/v1/chat/completions\n{first} ", listed)
    assert f"more: --after {first}" in listed
    assert run("batch", "list", "--after", second, "--limit", "1", "--json").json["data"][0]["id"] == first
    shown = run("batch", "show", second).out
    assert re.search(rf"input file\s+{file}\s+output file\s+file-", shown)
    assert run("batch", "show", first, "--json").json["x_fleet"]["priority"] == 5


def test_a_batch_is_cancelled_and_its_lines_are_run_again(run, work, api):
    api.worker.paused = True
    batch = started(run)
    cancelled = run("batch", "cancel", batch)
    waited = run("batch", "wait", batch, "--json")
    assert (cancelled.code, waited.code, waited.json["status"]) == (0, 5, "cancelled")

    go_on(api)
    again = run("batch", "retry", batch, "--only", "3", "--only", "4").out.strip()
    assert run("batch", "wait", again).code == 0
    assert re.search(rf"retry of\s+{batch}", run("batch", "show", again).out)
    assert ids(json.loads(raw) for raw in run("batch", "results", again).out.splitlines()) == ["3", "4"]


def test_results_are_followed_through_a_lost_connection_and_each_is_printed_once(run, work, api, proxy):
    api.worker.paused = True
    batch = started(run)
    assert run("batch", "results", batch) == Ran(0, "", "")

    def cut():
        proxy.reset_all()
        go_on(api)

    timer = threading.Timer(0.3, cut)
    timer.start()
    followed = run("batch", "results", batch, "--follow", *through(proxy))
    timer.join()
    lines = [json.loads(raw) for raw in followed.out.splitlines()]
    rest = run("batch", "results", batch, "--offset", "15").out.splitlines()

    assert followed.code == 0, followed.err
    assert ids(lines) == [f"{number}" for number in range(20)]
    assert [json.loads(raw) for raw in rest] == lines[15:]


def test_files_are_uploaded_listed_shown_read_and_deleted(run, work, tmp_path):
    made = run("files", "upload", "work.jsonl", "--expires-after", "3600", "--json").json
    file, text = made["id"], (tmp_path / "work.jsonl").read_text()

    assert made["expires_at"] - made["created_at"] == 3600
    assert re.search(rf"{file}\s+batch\s+[\d.]+ KiB\s+\w+\s+work.jsonl", run("files", "list").out)
    assert re.search(r"filename\s+work.jsonl", run("files", "show", file).out)
    assert run("files", "content", file, "-o", "copy").code == 0
    assert (tmp_path / "copy").read_text() == text
    assert run("files", "delete", file).out == f"{file} deleted\n"
    assert run("files", "show", file).code == 4


def test_a_files_content_is_printed_as_it_is(run, work, tmp_path, monkeypatch):
    file = run("files", "upload", "work.jsonl").out.strip()
    printed = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(printed, write_through=True))
    run("files", "content", file)

    assert printed.getvalue() == (tmp_path / "work.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("batch", "show", "batch_" + "0" * 32), 4, ["batch_not_found", "batch list"]),
        (("batch", "cancel", "x/../../models"), 4, ["batch_not_found"]),
        (("batch", "results", "..", "--follow"), 4, ["batch_not_found"]),
        (("batch", "create", "s3://bucket/in.jsonl"), 2, ["--endpoint"]),
        (("batch", "create", "s3://bucket/in.jsonl", "--endpoint", "/v1/responses"), 1, ["input_file_id"]),
        (("batch", "create", "work.jsonl", "--webhook", "http://10.0.0.1/"), 1, ["webhook"]),
        (("batch", "create", "absent.jsonl"), 2, ["there is no file"]),
        (
            ("batch", "create", "file-" + "0" * 32, "--endpoint", "/v1/chat/completions"),
            4,
            ["file_not_found", "files list"],
        ),
        (("batch", "create", "file-" + "0" * 32), 2, ["--endpoint"]),
        (("files", "content", "file-" + "0" * 32), 4, ["file_not_found"]),
        (("files", "delete", "../batches"), 4, ["file_not_found"]),
        (("batch", "list", "--api-url", "http://127.0.0.1:9"), 3, ["api_unreachable", "inferfleet up"]),
    ],
)
def test_an_error_says_what_why_and_what_to_try(run, work, arguments, code, words):
    ran = run(*arguments)

    assert (ran.code, ran.out) == (code, "")
    assert all(word in ran.err for word in words), ran.err
    assert "Traceback" not in ran.err


def test_the_shell_completes_batches_and_files(run, work):
    from inferfleet.workers.cli_options import complete_batches, complete_files

    file, batch = run("files", "upload", "work.jsonl").out.strip(), started(run)

    assert (file, "work.jsonl") in complete_files("file-")
    assert batch in [found for found, _ in complete_batches("batch_")]
