"""Calls that keep `inferfleet.run` messages between the broker and the end of their runs.

The broker forgets a message as soon as a worker has it. Here it is kept under a lease, so that the run of a process
that died is taken up by another, and an ETA outlives whoever heard of it.
"""

from collections.abc import Sequence

from inferfleet.tasks.call import Call, opt, text


def keep_run(task_id: str, queue: str, message: str, *, eta_ms: int | None, lease_ms: int) -> Call[bool]:
    """Keep a message that lay in the broker's list `queue`. False: its ETA has not come, the sweep will return it."""
    return Call("run_keep", (task_id, queue, message, opt(eta_ms), lease_ms), bool)


def beat_runs(task_ids: Sequence[str], lease_ms: int) -> Call[str]:
    """Whoever waits for these runs lives for lease_ms more."""
    return Call("run_beat", (lease_ms, *task_ids), text)


def drop_run(task_id: str) -> Call[str]:
    """The run has ended, and its result is stored."""
    return Call("run_drop", (task_id,), text)


def return_run(task_id: str, *, if_waiting: bool = False) -> Call[bool]:
    """Give a message back to the broker now; with if_waiting only one that waits for its ETA. False: none was kept."""
    return Call("run_return", (task_id, int(if_waiting)), bool)


def sweep_runs(limit: int) -> Call[tuple[int, int]]:
    """Give back to the broker: messages whose ETA has come, and those whose lease ended. Says how many of each."""
    return Call("run_sweep", (limit,), lambda answer: (int(answer[0]), int(answer[1])))
