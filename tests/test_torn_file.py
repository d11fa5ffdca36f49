"""A Redis that died in the middle of a write, and what its append-only file does at its next starts.

The file ends inside what a script wrote: MULTI, its commands, EXEC. Redis 7.0.15 cuts such a file behind the last whole
command and goes on writing there; its start after that runs the half of the script with whatever came behind it.
"""

import errno
import functools
import os
import shutil
import uuid
from contextlib import closing, contextmanager
from pathlib import Path

import psutil
import pytest
import redis
from conftest import RedisServer, missing, redis_binary
from fleet import Fleet, until
from invariants import Accepted, ownerless, strangers, unrest
from ledger_moves import claim, submit
from test_ledger_server import valkey_binary

from inferfleet.tasks.errors import LedgerUnavailable, SetupError
from inferfleet.tasks.ledger import Ledger
from inferfleet.workers import rewriter, up
from inferfleet.workers.embedded import await_redis, start_redis, start_redis_again
from inferfleet.workers.rewriter import Rewriter, has_failed, is_due
from inferfleet.workers.torn_file import mend

SCRIPTS = ("submit", "claim", "publish", "complete")


# Files ---------------------------------------------------------------------------------------------------------------


def last_part(folder):
    """What was written last."""
    return max(folder.rglob("*.incr.aof"), key=lambda path: int(path.name.split(".")[2]))


def commands(data):
    """Where each command begins and ends, and its name."""
    found, at = [], 0
    while at < len(data):
        start, words = at, []
        count, at = number(data, at)
        for _ in range(count):
            size, at = number(data, at)
            words.append(data[at : at + size])
            at += size + 2
        found.append((start, at, words[0].decode().upper()))
    return found


def number(data, at):
    end = data.index(b"\r\n", at)
    return int(data[at + 1 : end]), end + 2


def cuts(path):
    """Inside each command of the last script's block, and behind each but the last."""
    found = commands(path.read_bytes())
    first = max(place for place, (_, _, name) in enumerate(found) if name == "MULTI")
    return [cut for start, end, _ in found[first:] for cut in ((start + end) // 2, end)][:-1]


@pytest.fixture(scope="module")
def written(redis_binary_path, tmp_path_factory):
    """script -> the folder of a server that was killed right after it."""
    return functools.cache(lambda script: _written(script, redis_binary_path, tmp_path_factory.mktemp(script)))


def _written(script, binary, folder):
    server = RedisServer(binary, folder, "always")
    server.start()
    ledger = Ledger.from_url(server.url, "test")
    for place in range(2):
        # the checker of Redis 7 takes any file with a line that begins so for a manifest
        submit(ledger, f"job_{place}", idempotency_key=f"key{place}", custom_id="file")
    if script == "submit":
        submit(ledger, "job_torn", idempotency_key="key")
    else:
        taken = claim(ledger, "torn", lease_ms=1)
    if script == "publish":
        ledger.publish(taken.job_id, taken.fence, [{"type": "x"}, {"type": "y"}], "p")
    if script == "complete":
        ledger.complete(taken.job_id, taken.fence, state="completed", response=b"{}")
    ledger.close()
    server.kill()
    return folder


def torn(written, folder, cut):
    """A copy of the folder, whose file ends at `cut`."""
    shutil.copytree(written, folder)
    os.truncate(last_part(folder), cut)
    return folder


@contextmanager
def ledger_of(url):
    ledger = Ledger.from_url(url, "test")
    with redis.Redis.from_url(url) as client:
        client.config_set("appendfsync", "always")  # else kill -9 may take the last second
    try:
        yield ledger
    finally:
        ledger.close()


def half_done(ledger, accepted):
    """What is missing, or there by half, of a fleet in which these jobs were accepted: sentences. Ends all jobs."""
    jobs = [Accepted(job_id) for job_id in accepted]
    wrong = strangers(ledger, jobs, tenant="a")
    waiting = ledger.redis.zrange(f"{ledger.prefix}in:queued:a", 0, -1)
    size = sum(int(ledger.redis.hget(f"{ledger.prefix}job:{name.decode()}", "bytes") or 0) for name in waiting)
    if (counted := int(ledger.redis.hget(f"{ledger.prefix}bytes", "a") or 0)) != size:
        wrong.append(f"{counted} bytes are counted, and the jobs that wait have {size}")
    try:
        ledger.reap()
        while taken := claim(ledger, uuid.uuid4().hex):
            ledger.complete(taken.job_id, taken.fence, state="completed", response=b"{}")
    except redis.ResponseError as error:
        return [*wrong, f"a script breaks: {error}"]
    states = {job.id: job.state for job in ledger.list("a", limit=100).jobs}
    wrong += [f"{name} is {states.get(name)}" for name in accepted if states.get(name) != "completed"]
    ledger.sweep(result_ttl_ms=0)
    return wrong + unrest(ledger) + ownerless(ledger)


# The server that `inferfleet up` starts ------------------------------------------------------------------------------


def killed(server):
    server.child.process.kill()
    server.child.process.wait()


def killed_and_started(server, folder):
    killed(server)
    server = start_redis_again(server, folder, folder / "redis.log")
    await_redis(server.child, server.url)
    return server


@pytest.mark.parametrize("script", ["submit", *(pytest.param(name, marks=pytest.mark.slow) for name in SCRIPTS[1:])])
def test_of_a_script_that_was_half_written_nothing_is_left_after_two_starts(
    script, written, redis_binary_path, tmp_path
):
    wrong = {}
    for cut in cuts(last_part(written(script))):
        folder = torn(written(script), tmp_path / str(cut), cut)
        server = start_redis(Path(redis_binary_path), folder, folder / "redis.log")
        with ledger_of(server.url) as ledger:
            submit(ledger, "job_2")
            server = killed_and_started(server, folder)
            wrong[cut] = half_done(ledger, ["job_0", "job_1", "job_2"])
        killed(server)
    assert {cut: found for cut, found in wrong.items() if found} == {}


@pytest.fixture
def folder(written, tmp_path):
    """Of a server that died when all of a submission was in the file but the end of EXEC."""
    return torn(written("submit"), tmp_path / "redis", cuts(last_part(written("submit")))[-1])


def test_what_is_written_alone_behind_a_half_script_is_kept(folder, redis_binary_path):
    server = start_redis(Path(redis_binary_path), folder, folder / "redis.log")
    with ledger_of(server.url) as ledger:
        ledger.put_key("0" * 64, "a", "a key")
        server = killed_and_started(server, folder)
        assert list(ledger.list_keys()) == ["0" * 64]
    killed(server)


def test_a_server_that_is_killed_while_it_writes_its_file_anew_starts_again(folder, redis_binary_path):
    server = start_redis(Path(redis_binary_path), folder, folder / "redis.log")
    with ledger_of(server.url) as ledger:
        ledger.redis.bgrewriteaof()
        submit(ledger, "job_2")
        server = killed_and_started(server, folder)
        assert half_done(ledger, ["job_0", "job_1", "job_2"]) == []
    killed(server)


def test_up_says_that_it_took_half_a_write_out_of_the_file(folder, redis_binary_path, monkeypatch):
    monkeypatch.setenv("PATH", str(Path(redis_binary_path).parent))
    notes = Notes()
    fleet = up.Fleet(up.Plan(folder.parent, {}, "127.0.0.1", 8000, None, "test", 1.0), notes)

    fleet._start_redis()

    assert notes.told == [f"redis died in a write: {fleet.redis.mended} unfinished bytes were taken out of its file"]
    assert fleet.redis.mended > 0
    killed(fleet.redis)
    fleet._start_redis_again()  # of a file that is whole
    assert len(notes.told) == 1
    fleet.end()


class Notes:
    def __init__(self):
        self.told = []

    def note(self, text):
        self.told.append(text)

    def phase(self, name, seconds, detail):
        pass


# The mender ----------------------------------------------------------------------------------------------------------

BINARIES = {"redis": lambda: redis_binary() or missing("redis-server"), "valkey": valkey_binary}
ONE = b"*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$5\r\nMULTI\r\n"
MULTI, EXEC = b"*1\r\n$5\r\nMULTI\r\n", b"*1\r\n$4\r\nEXEC\r\n"
#: What stands behind whole commands, and how many bytes of it go.
TAILS = {
    "nothing": (b"", 0),
    "a whole script": (MULTI + ONE + EXEC, 0),
    "half a command": (ONE[:-4], len(ONE) - 4),
    "a sign": (b"*", 1),
    "half an end of line": (b"*1\r", 3),
    "half a script": (MULTI + ONE, len(MULTI + ONE)),
    "half a command of half a script": (MULTI + ONE + ONE[:9], len(MULTI + ONE) + 9),
    "a script behind half a one": (MULTI + ONE + MULTI + ONE + EXEC, 0),
    "zeros": (bytes(64), 0),
    "something else": (b"x" + ONE, 0),
    "something else inside a script": (MULTI + b"x" + ONE, 0),
    "a wrong length": (MULTI + ONE.replace(b"$5", b"$4") + EXEC, 0),
}


@pytest.mark.parametrize("name", TAILS)
@pytest.mark.parametrize("server", BINARIES)
@pytest.mark.parametrize("place", ["appendonlydir/appendonly.aof.7.incr.aof", "appendonly.aof"])
def test_only_an_end_that_is_missing_is_taken_off(tmp_path, server, name, place):
    tail, gone = TAILS[name]
    path = tmp_path / place
    path.parent.mkdir(exist_ok=True)
    if place != "appendonly.aof":
        listed = ["2.base.rdb seq 2 type b", "6.incr.aof seq 6 type i", "7.incr.aof seq 7 type i"]
        lines = "".join(f"file appendonly.aof.{line}\n" for line in listed)
        (path.parent / "appendonly.aof.manifest").write_text(lines)
        for earlier in ("2.base.rdb", "6.incr.aof"):
            (path.parent / f"appendonly.aof.{earlier}").write_bytes(ONE)
    path.write_bytes(ONE + MULTI + ONE + EXEC + tail)
    size = path.stat().st_size

    assert mend(BINARIES[server](), tmp_path, 30) == gone
    assert path.stat().st_size == size - gone
    assert mend(BINARIES[server](), tmp_path, 30) == 0


def test_where_there_is_no_file_yet_there_is_nothing_to_mend(tmp_path, redis_binary_path):
    assert mend(redis_binary_path, tmp_path, 30) == 0
    (tmp_path / "appendonly.aof").touch()
    assert mend(redis_binary_path, tmp_path, 30) == 0
    (tmp_path / "appendonlydir").mkdir()
    (tmp_path / "appendonlydir" / "appendonly.aof.manifest").write_text("file gone.1.incr.aof seq 1 type i\n")
    assert mend(redis_binary_path, tmp_path, 30) == 0


def test_a_server_that_is_no_checker_leaves_the_file_as_it_is(tmp_path):
    (tmp_path / "appendonly.aof").write_bytes(ONE[:-4])
    assert mend("/bin/true", tmp_path, 30) == 0


def test_a_check_that_does_not_end_and_a_file_that_cannot_be_written_are_told(tmp_path, redis_binary_path, monkeypatch):
    (tmp_path / "appendonly.aof").write_bytes(ONE[:-4])
    slow = tmp_path / "slow"
    slow.write_text("#!/bin/sh\nexec sleep 60\n")
    slow.chmod(0o700)
    with pytest.raises(SetupError, match="did not end within 0 s") as error:
        mend(str(slow), tmp_path, 0.1)
    assert error.value.param == "data_dir"

    def read_only(path, mode):
        if "+" in mode:
            raise OSError(errno.EROFS, "Read-only file system")
        return open(path, mode)

    monkeypatch.setattr(Path, "open", read_only)
    with pytest.raises(SetupError, match=r"cannot mend .*appendonly\.aof: Read-only file system"):
        mend(redis_binary_path, tmp_path, 30)


# A Redis that others start -------------------------------------------------------------------------------------------


@pytest.fixture
def started(folder, redis_binary_path):
    with RedisServer(redis_binary_path, folder, "always") as server:
        yield server


@pytest.fixture
def said(monkeypatch):
    lines = []
    monkeypatch.setattr(rewriter.log, "warning", lambda event, reason: lines.append((event, reason)))
    return lines


def is_rewritten(client):
    info = client.info("persistence")
    return not info["aof_rewrite_in_progress"] and info["aof_last_rewrite_time_sec"] >= 0


def test_a_redis_that_others_start_runs_no_half_script_at_its_next_start(started):
    with ledger_of(started.url) as ledger:
        Rewriter(ledger.redis).round()
        until(lambda: not ledger.redis.info("persistence")["aof_rewrite_in_progress"])
        submit(ledger, "job_2")
        started.kill()
        started.start()
        assert half_done(ledger, ["job_0", "job_1", "job_2"]) == []


def test_a_redis_is_asked_once_after_each_of_its_starts(own_redis):
    with redis.Redis(port=own_redis.port) as client:
        rounds = [Rewriter(client), Rewriter(client)]
        for _ in range(2):
            for each in rounds * 2:
                each.round()
            until(lambda: is_rewritten(client))
            for each in rounds:
                each.round()
            assert client.info("persistence")["aof_rewrites"] == 1
            own_redis.kill()
            own_redis.start()


def test_a_worker_has_a_redis_that_was_started_again_write_its_file_anew(own_redis, tmp_path):
    with closing(Fleet(own_redis.url, tmp_path)) as fleet:
        fleet.start_worker()
        until(lambda: is_rewritten(fleet.ledger.redis))
        own_redis.kill()
        own_redis.start()
        until(lambda: is_rewritten(fleet.ledger.redis))


def test_a_redis_that_forbids_it_is_told_of_once_and_left(own_redis, said, monkeypatch):
    with redis.Redis(port=own_redis.port) as owner:
        owner.execute_command("ACL", "SETUSER", "fleet", "on", "nopass", "~*", "+@all", "-bgrewriteaof")
    with redis.Redis(port=own_redis.port, username="fleet", password="x") as client:
        rounds = Rewriter(client)
        monkeypatch.setattr(rewriter, "REFUSED_SECONDS", 0)
        for _ in range(3):
            rounds.round()
    ((event, reason),) = said
    assert event == "append_only_file_not_rewritten" and "bgrewriteaof" in reason
    with redis.Redis(port=own_redis.port) as owner:
        assert owner.info("persistence")["aof_rewrites"] == 0


def test_a_redis_without_an_append_only_file_is_not_asked(own_redis, said):
    with redis.Redis(port=own_redis.port) as client:
        client.config_set("appendonly", "no")
        Rewriter(client).round()
        assert client.info("persistence")["aof_rewrites"] == 0
    assert said == []


def test_a_redis_that_is_away_is_no_refusal(own_redis, said):
    with redis.Redis(port=own_redis.port, retry=None) as client:
        own_redis.kill()
        with pytest.raises(LedgerUnavailable):
            Rewriter(client).round()
        own_redis.start()
        Rewriter(client).round()
        until(lambda: is_rewritten(client))
    assert said == []


def test_a_rewrite_that_failed_is_told_of_once(own_redis, said):
    with redis.Redis(port=own_redis.port) as client:
        client.set("key", os.urandom(300_000))  # no new file has room for it
        psutil.Process(own_redis.process.pid).rlimit(psutil.RLIMIT_FSIZE, (100_000, 100_000))
        rounds = Rewriter(client)
        rounds.round()
        until(lambda: has_failed(client.info("persistence")))
        for _ in range(3):
            rounds.round()
    assert [event for event, _ in said] == ["append_only_file_not_rewritten"]


FRESH = {"aof_enabled": 1, "aof_last_rewrite_time_sec": -1, "aof_last_bgrewrite_status": "ok"}


@pytest.mark.parametrize(
    ("changed", "due"),
    [
        ({}, True),
        ({"aof_last_rewrite_time_sec": 0}, False),
        ({"aof_last_bgrewrite_status": "err"}, False),
        ({"loading": 1}, False),
        ({"aof_rewrite_in_progress": 1}, False),
        ({"aof_rewrite_scheduled": 1}, False),
        ({"aof_last_write_status": "err"}, False),
        ({"aof_enabled": 0}, False),
    ],
)
def test_a_new_file_is_due_once_after_a_start_while_the_server_can_write(changed, due):
    assert is_due(FRESH | changed) is due
