"""`inferfleet jobs lookup` as a shell calls it."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest
from live_api import LiveApi, running_api

from inferfleet.tasks.names import new_job_id
from inferfleet.workers import cli_jobs


@pytest.fixture(scope="module")
def shared_api(session_redis) -> Iterator[LiveApi]:
    with running_api(session_redis.url) as api:
        yield api


@pytest.fixture
def known(api) -> dict[str, str]:
    """Three keys with their jobs, which wait."""
    api.worker.paused = True
    body = {"body": {"model": "paper", "messages": [{"role": "user", "content": "say hi"}]}}
    with api.http() as http:
        return {
            key: http.post("/v1/jobs", json=body, headers={"Idempotency-Key": key}).json()["id"]
            for key in (f"{new_job_id()} [b]" for _ in range(3))
        }


def written(path, *keys: str) -> str:
    path.write_text("".join(f"{key}\n" for key in keys))
    return str(path)


def test_keys_are_shown_with_their_jobs_and_the_exit_code_says_whether_all_have_one(run, known, tmp_path):
    first, second, third = known
    found = run("jobs", "lookup", written(tmp_path / "all", *known))
    partly = run("jobs", "lookup", written(tmp_path / "some", third, "nobody's", first))

    assert (found.code, partly.code) == (0, 5)
    assert re.search(rf"{re.escape(second)} +{known[second]} +queued", found.out)
    rows = [re.split(" {2,}", line.strip()) for line in partly.out.splitlines()[1:]]
    assert rows == [[third, known[third], "queued"], ["nobody's", "-", "missing"], [first, known[first], "queued"]]


def test_the_missing_keys_alone_are_lines_for_a_script(run, known, tmp_path):
    long = "x " * 127 + "x"
    path = written(tmp_path / "keys", "b", *known, long, "a", "b")

    assert run("jobs", "lookup", path, "--missing").out == f"b\n{long}\na\n"
    assert [each["idempotency_key"] for each in run("jobs", "lookup", path, "--missing", "--json").json["data"]] == [
        "b", long, "a",
    ]  # fmt: skip
    none = run("jobs", "lookup", written(tmp_path / "known", *known), "--missing")
    assert (none.code, none.out) == (0, "")


def test_more_keys_than_one_question_takes_are_asked_in_pieces(run, known, tmp_path):
    keys = [*(f"key {number}" for number in range(2500)), *known]

    ran = run("jobs", "lookup", written(tmp_path / "keys", *keys), "--json")

    assert ran.code == 5
    assert [each["idempotency_key"] for each in ran.json["data"]] == keys
    assert [each["job_id"] for each in ran.json["data"][2500:]] == list(known.values())


def test_keys_are_read_from_a_pipe_whatever_ends_its_lines(known, run):
    env = {**os.environ, "COLUMNS": "40"}  # run has set where the API is
    command = [sys.executable, "-m", "inferfleet.workers.cli", "jobs", "lookup", "-"]

    def piped(data: bytes) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(command, env=env, input=data, capture_output=True, check=False)

    done, broken = piped("\r\n".join(known).encode()), piped(b"key\nk\xff\n")

    assert (done.returncode, done.stderr) == (0, b"")
    assert all(re.search(rf"{re.escape(key)} +{job} +queued", done.stdout.decode()) for key, job in known.items())
    assert broken.returncode == 1
    assert b"line 2 must be 1 to 255 printable ASCII characters" in broken.stderr


@pytest.mark.parametrize(
    ("content", "code", "words"),
    [
        (None, 2, ["FILE", "No such file"]),
        (b"", 1, ["FILE is empty", "invalid_request"]),
        (b"one\n\nthree\n", 1, ["line 2", "1 to 255", "invalid_request"]),
        (b"one\n two\n", 1, ["line 2", "printable ASCII"]),
        (b"one\ntwo\n" + b"x" * 256 + b"\n", 1, ["line 3", "255"]),
        (b"\xef\xbb\xbfone\n", 1, ["line 1"]),
        (b"x" * 1_000_000, 1, ["line 1", "255"]),
        (b"1\n2\n3\n4\n5\n", 1, ["at most 4 keys", "FILE"]),
    ],
)
def test_a_file_that_holds_no_keys_is_refused_by_its_line(run, tmp_path, monkeypatch, content, code, words):
    monkeypatch.setattr(cli_jobs, "MAX_FILE_KEYS", 4)
    if content is not None:
        (tmp_path / "keys").write_bytes(content)

    ran = run("jobs", "lookup", "keys")

    assert (ran.code, ran.out) == (code, "")
    assert all(word in ran.err for word in words), ran.err
    assert "Traceback" not in ran.err
