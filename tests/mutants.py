"""Switches one mechanism off at a time, in a copy of the tree, and sees that a test goes red; writes tests/FAULTS.md.

    python tests/mutants.py [--only NUMBER ...] [--jobs 1]

A test that stays green with its mechanism off proves nothing: then the run fails. Every mutant names a text of a source
file and what stands there instead; a text that is not there (any more) fails too.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("tasks", "workers", "engine", "kernels")
TABLE = ROOT / "tests" / "FAULTS.md"
SECONDS = 400


@dataclass(frozen=True)
class Mutant:
    """One mechanism that is off."""

    #: The fault's number and what happens.
    fault: str
    #: What keeps the promise, in words.
    mechanism: str
    path: str
    old: str
    new: str
    #: file::test
    test: str


HELD = "return (job.state == 'in_progress' or job.state == 'cancelling') and job.fence == fence"
MUTANTS = (
    Mutant("1 kill -9 of a worker in the middle of a batch", "workers of its machine see that its process is gone",
           "workers/janitor.py", "        self._bury_neighbours()\n", "        pass\n",
           "test_worker_faults.py::"
           "test_a_worker_that_is_gone_from_its_machine_loses_its_jobs_long_before_their_leases_end"),
    Mutant("1 a worker that nobody hears of any more", "leases end, and any worker's janitor takes the jobs back",
           "workers/janitor.py", "        self._reap()\n", "        pass\n",
           "test_worker_faults.py::test_a_stopped_worker_that_comes_back_writes_nothing_any_more"),
    Mutant("2 SIGSTOP longer than a lease, then SIGCONT", "every write names its claim's fence",
           "tasks/lua/records.lua", HELD, HELD.replace(" and job.fence == fence", ""),
           "test_ledger.py::test_a_stale_fence_can_change_nothing"),
    Mutant("3 reply to BRPOP lost: the broker's message is gone", "the sweep rings for jobs that wait",
           "workers/janitor.py", "if missing > 0:", "if False:",
           "test_worker_faults.py::test_a_turn_lost_on_the_wire_is_rung_again_by_a_janitor"),
    Mutant("4 reply to a submit lost", "the idempotency key finds the first job",
           "tasks/lua/submit.lua", "if not answer and idem ~= '' then", "if false then",
           "test_lost_replies.py::test_submit_from_sixteen_threads_with_one_key_through_lost_replies_makes_one_job"),
    Mutant("5 reply to a completion lost", "the same fence is answered the same",
           "tasks/lua/complete.lua", "job.done_fence == fence then return 'same' end", "false then return 'same' end",
           "test_lost_replies.py::test_a_completion_whose_reply_was_lost_answers_same_with_one_terminal_event"),
    Mutant("5 reply to a claim lost", "a token takes one job",
           "tasks/lua/claim.lua", "local used = redis.call('GET', token_key)", "local used = false",
           "test_lost_replies.py::test_a_claim_whose_reply_was_lost_takes_one_job_with_one_fence"),
    Mutant("6 one turn arrives ten times", "a claim takes a job out of the queue",
           "tasks/lua/claim.lua", "  unqueue(job)\n", "",
           "test_workers.py::test_doubled_turns_do_no_harm"),
    Mutant("7 kill -9 of Redis", "the append-only file, written before the answer",
           "tests/conftest.py", '"appendonly": "yes"', '"appendonly": "no"',
           "test_ledger_server.py::test_what_was_accepted_is_there_after_the_server_was_killed"),
    Mutant("8 power cut", "appendfsync always",
           "tests/test_faults.py", 'tmp_path, "always") as server', 'tmp_path, "everysec") as server',
           "test_faults.py::test_a_power_cut_takes_no_job_that_was_accepted"),
    Mutant("9 Redis stands still for longer than a lease", "after a silence the reaper waits for a lease's time",
           "tasks/lua/reap.lua", "if NOW < not_before then return answer end", "",
           "test_faults.py::test_a_redis_that_stood_still_for_longer_than_a_lease_costs_no_job_a_death"),
    Mutant("10 disk full", "a refused write is a 503 that can be repeated",
           "tasks/ledger.py", "(MISCONF|OOM", "(OOM",
           "test_faults.py::test_a_full_disk_is_a_503_and_loses_nothing_once_there_is_room"),
    Mutant("11 maxmemory reached", "a refused write is a 503 that can be repeated",
           "tasks/ledger.py", "REFUSALS = (exceptions.OutOfMemoryError, ", "REFUSALS = (",
           "test_faults.py::test_a_redis_without_memory_is_a_503_and_takes_jobs_again_once_it_has_some"),
    Mutant("12 failover to a replica that lagged: a claim that it never saw", "a fence is at least the server's time",
           "tasks/lua/records.lua", "whole(math.max(tonumber(last) + 1, NOW_US))", "whole(tonumber(last) + 1)",
           "test_failover.py::test_a_claim_that_the_replica_never_saw_bears_another_fence_than_the_next"),
    Mutant("12 failover: words of a job that runs", "each publication names the one before it",
           "tasks/lua/records.lua", "if last == '' or tokens_of(job)[last] then return false end",
           "if true then return false end",
           "test_failover.py::test_a_job_whose_last_words_were_lost_goes_on_from_the_log_without_a_death"),
    Mutant("12 failover: ends of a batch's lines", "a commit that is ahead of the shelf is stale",
           "tasks/lua/batch_commit.lua", "if tonumber(batch.lines) < tonumber(ARGV[3]) then return 'stale' end", "",
           "test_failover.py::test_lines_of_a_batch_whose_ends_were_lost_are_not_taken_for_written"),
    Mutant("12 failover: events that receivers know", "an event's id is made of its type too",
           "tasks/lua/outbox.lua", "event.subject .. ' ' .. event.type .. ' ' .. event.key",
           "event.subject .. ' ' .. event.key",
           "test_failover.py::test_another_event_of_a_job_has_another_id_though_it_has_the_same_number"),
    Mutant("12 failover: events that readers have seen", "a reader's last event is compared with the log",
           "workers/api/hub.py", "            self._look_again()\n", "            pass\n",
           "test_failover.py::test_a_fleet_goes_on_behind_a_failover_and_a_producer_finds_what_was_lost"),
    Mutant("12 failover: whoever waits for a lost job", "a job that is gone after an outage is a 503",
           "workers/api/hub.py", "            if self._num_outages == outages:\n", "            if True:\n",
           "test_failover.py::test_a_client_that_waits_for_a_job_that_is_lost_sends_it_again_by_itself"),
    Mutant("13 RST on idle connections", "a connection that was cut is made anew",
           "tasks/ledger.py", ", supported_errors=BROKEN", "",
           "test_lost_replies.py::test_connections_that_were_cut_while_uvloop_held_them_are_made_anew"),
    Mutant("13 RST on all connections, over and over", "turns are swept again after they died with their connection",
           "workers/janitor.py", "if missing > 0:", "if False:",
           "test_worker_faults.py::test_connections_cut_over_and_over_end_no_worker_and_no_job"),
    Mutant("14 a slow wire in small pieces", "patience of eight seconds for one answer",
           "tasks/ledger.py", "SOCKET_TIMEOUT = 8.0", "SOCKET_TIMEOUT = 0.02",
           "test_lost_replies.py::test_a_slow_link_changes_no_answer"),
    Mutant("15 the bucket gives other bytes", "SHA-256 of every file that is read",
           "tasks/stores/store.py", "if hashlib.sha256(data).hexdigest() != sha256:", "if False:",
           "test_stores.py::test_a_file_with_another_digest_is_told_and_not_given"),
    Mutant("15 the bucket is away", "a store that does not answer is waited for, and leases are renewed",
           "workers/heart.py", "if moved or flight.in_our_hands}", "if moved}",
           "test_s3_jobs.py::test_a_bucket_that_is_away_while_a_picture_is_stored_fails_no_job"),
    Mutant("16 a receiver that fails ten times", "the circuit breaker",
           "tasks/lua/record_delivery.lua", "if failures >= BREAKER_FAILURES then", "if false then",
           "test_outbox.py::test_after_ten_failures_in_a_row_a_receiver_is_left_alone_for_a_minute"),
    Mutant("16 410 Gone", "the receiver is disabled",
           "tasks/lua/record_delivery.lua", "local why = outcome == 'gone' and 'gone' or ''", "local why = ''",
           "test_outbox.py::test_an_endpoint_that_is_gone_is_disabled_and_its_queue_waits_until_it_is_enabled"),
    Mutant("16 kill -9 of a sender", "a delivery is leased, and taken back when the lease is over",
           "tasks/lua/take_delivery.lua", "  take_back_lost(receiver)\n", "",
           "test_webhook_worker.py::test_a_delivery_in_the_hands_of_a_worker_that_is_killed_goes_again_under_the_same_id"),
    Mutant("17 SIGTERM with a grace that is too short", "what runs is handed back, and no death is counted",
           "workers/porter.py", "            return self._hand_back(flight, suspect=False)",
           "            return self._count_death(flight)",
           "test_workers.py::test_what_outlives_the_grace_is_handed_back_and_goes_on_where_it_was"),
    Mutant("18 a poison job in a batch of six", "after a crash in company each job runs alone once",
           "workers/porter.py", "if flight.num_crashed > 1 else", "if False else",
           "test_worker_faults.py::test_only_the_culprit_of_a_crashed_batch_collects_deaths"),
    Mutant("19 a worker's clock is an hour off", "time left is counted from Redis' own time of the claim",
           "workers/porter.py", "(claim.deadline_ms - claim.now_ms) / 1000)",
           "claim.deadline_ms / 1000 - __import__('time').time())",
           "test_faults.py::test_a_worker_whose_clock_is_an_hour_off_keeps_its_jobs_and_meets_their_deadlines"),
    Mutant("19 sweepers meet", "taking a job back ends its lease in the same script",
           "tasks/lua/records.lua", "  redis.call('ZREM', P .. 'leases', job.id)\nend", "end",
           "test_faults.py::test_sweepers_that_meet_count_one_death"),
    Mutant("20 a step that hangs", "an engine that stands still is ended, however alive its process is",
           "workers/heart.py", "if still > self._stall_seconds:", "if False:",
           "test_worker_faults.py::test_a_hung_engine_loses_its_job_and_is_replaced"),
    Mutant("20 an engine that dies", "its jobs are taken back at once, without waiting for the lease",
           "workers/porter.py", "            return self._after_crash(flight)",
           "            return self._lost(flight.model)",
           "test_worker_faults.py::test_a_killed_engine_s_job_is_taken_back_at_once_and_a_fresh_engine_finishes_it"),
    Mutant("torn file of a Redis that `up` starts", "half a script at its end is taken off before the start",
           "workers/torn_file.py", "if start >= end or not _is_unfinished(path, start):", "if True:",
           "test_torn_file.py::test_of_a_script_that_was_half_written_nothing_is_left_after_two_starts"),
    Mutant("torn file of a Redis that others start", "a worker has it write a new file after each of its starts",
           "workers/rewriter.py", "self._client.bgrewriteaof()", "pass",
           "test_torn_file.py::test_a_redis_that_others_start_runs_no_half_script_at_its_next_start"),
    Mutant("promise: an end is told once", "the outbox is written by the script that ends the job",
           "tasks/lua/records.lua", "  tell(job, state, ((result.outputs", "  tell(job, 'nothing', ((result.outputs",
           "test_outbox.py::test_the_end_of_a_job_is_told_to_its_webhook_once"),
    Mutant("promise: cancel is final", "a job that was asked to stop ends as cancelled whatever its worker says",
           "tasks/lua/complete.lua", "if job.state == 'cancelling' then", "if false then",
           "test_ledger.py::test_cancel_of_a_running_job_is_told_to_its_worker_and_final_whatever_it_answers"),
    Mutant("promise: deadlines are met while a job waits", "the sweep looks at deadlines",
           "tasks/lua/sweep.lua", "local expired = redis.call(", "local expired = {} or redis.call(",
           "test_ledger_time.py::test_a_deadline_in_the_past_expires_in_the_sweep"),
    Mutant("promise: overload is refused early", "a full queue is a 429 with a time",
           "tasks/lua/submit.lua", "if max_queued and waiting >= max_queued then", "if false then",
           "test_ledger.py::test_a_full_queue_refuses_with_a_time_to_come_back_and_takes_a_replay"),
    Mutant("promise: a webhook reaches no inside", "every address that a name gives is checked",
           "workers/webhooks/guard.py", "        for address in addresses:\n",
           "        for address in addresses[:1]:\n",
           "test_webhook_guard.py"),
    Mutant("promise: a batch's lines end once", "a commit names the lines that were there before",
           "tasks/lua/batch_commit.lua", "if batch.lines ~= ARGV[3] then return 'same' end", "",
           "test_batch_faults.py::test_what_a_runner_says_twice_counts_once"),
    Mutant("promise: no 404 for a model whose workers cannot speak", "cards are remembered for ten minutes",
           "tasks/lua/present.lua", "if ARGV[2] ~= '' then", "if false then",
           "test_ledger_lists.py::test_a_model_whose_workers_fell_silent_is_remembered_for_a_while_as_unserved"),
)  # fmt: skip


def run(mutant: Mutant) -> str:
    """What went red, or an empty string."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        copy = Path(folder)
        for room in (*ROOMS, "tests", "ops"):
            shutil.copytree(ROOT / room, copy / room, ignore=shutil.ignore_patterns("__pycache__", "demo_image_model"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        links = copy / "build" / "types" / "inferfleet"
        links.mkdir(parents=True)
        for room in ROOMS:
            (links / room).symlink_to(copy / room)
        source = copy / mutant.path
        text = source.read_text()
        if text.count(mutant.old) != 1:
            return f"NOT FOUND ONCE in {mutant.path}: {mutant.old!r}"
        source.write_text(text.replace(mutant.old, mutant.new))
        cache = ROOT / ".pytest_cache"
        command = [sys.executable, "-m", "pytest", "-n", "0", "-x", "--tb=short", "-o", f"cache_dir={cache}"]
        command.append(f"tests/{mutant.test}")
        env = os.environ | {"PYTHONPATH": str(links.parent)}
        done = subprocess.run(command, cwd=copy, env=env, capture_output=True, text=True, timeout=SECONDS, check=False)
        return reason(done.stdout) if done.returncode == 1 else ""


def reason(output: str) -> str:
    """The first words of what a failed test says."""
    found = re.search(r"^E +(.*)$", output, re.MULTILINE)
    said = found[1] if found else output.strip().splitlines()[-1]
    return re.sub(r"[0-9a-f]{32}", "…", said)[:140].replace("|", "\\|")


HEAD = """\
# Faults, and the tests that were seen to fail

Each row: what happens, what keeps the promise, the test, what was switched off to see it fail, and what it then said.
`python tests/mutants.py` does it again, in copies of the tree, and writes the table. Over all of them together:
`tests/test_soak.py` (soak/, invariants.py).

| fault | mechanism | test | switched off | went red with |
|---|---|---|---|---|
"""
TAIL = """
A failover to a replica that lagged (fault 12) loses what the replica had not seen: that cannot be helped here, but is
noted (`redis_failed_over`, a metric), and producers find out with `inferfleet jobs lookup` which of their idempotency
keys are gone. OOM (fault 18) is tested as what it is to the fleet, an engine process that is gone. A real SIGSTOP
(fault 2) is in `test_worker_faults.py`; it stays green without the fence, because the woken worker asks the ledger
before it writes: the fence is the second wall, so it is tested by hand. A clock that is off (fault 19) is the wall
clock as Python sees it in the worker's process.

A torn file: kill -9 alone is enough where a write is long (12 of 36 kills while values of 0.2 to 20 MB were written), a
power cut and a full disk are others. Redis 7.0.15 cuts such a file behind the last whole command, inside a script's
MULTI, and the start after the next one runs that half together with the next whole script. Seen then, with the two
mechanisms off: jobs that nobody was told of, accepted jobs that never run, counts that are wrong (waiting bytes among
them), scripts that raise for a whole model, and a lone write that was acknowledged and is gone. Valkey 9.1.2 cuts
before the MULTI. `inferfleet up` mends the file before each start. For a Redis that others start a worker can only ask
for a new file after the start: not promised is what a second death before that ask leaves. A second death before that
file is whole makes 7.0.15 refuse one start ("the truncated file is not the last file"); the one after it goes well.
"""


def row(mutant: Mutant, said: str) -> str:
    name = mutant.test.partition("::")[2] or mutant.test
    off = f"`{mutant.path}`: `{mutant.old.strip().splitlines()[0][:60]}`".replace("|", "\\|")
    return f"| {mutant.fault} | {mutant.mechanism} | {name.replace('_', ' ')} | {off} | {said} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="*", help="mutants of these faults; writes no table")
    parser.add_argument("--jobs", type=int, default=1, help="so many at once")
    options = parser.parse_args()
    chosen = [each for each in MUTANTS if not options.only or each.fault.split()[0] in options.only]
    rows, survivors = [], 0
    with ThreadPoolExecutor(options.jobs) as pool:
        for mutant, said in zip(chosen, pool.map(run, chosen), strict=True):
            bad = not said or said.startswith("NOT FOUND")
            survivors += bad
            print(f"{'SURVIVED' if bad else 'red':9} {mutant.fault}: {said}", flush=True)
            rows.append(row(mutant, said or "**nothing: it stayed green**"))
    if not options.only:
        TABLE.write_text(HEAD + "\n".join(rows) + "\n" + TAIL)
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
