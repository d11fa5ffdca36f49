"""Which process of a machine is gone, and which only cannot be looked at."""

import os
import subprocess

from inferfleet.workers import neighbours
from inferfleet.workers.neighbours import STARTED, Neighbours, is_gone, stat_of


def test_a_process_is_gone_when_it_died_or_when_another_bears_its_id():
    child = subprocess.Popen(["sleep", "60"])
    started = stat_of(child.pid)[STARTED]
    assert not is_gone(child.pid, started)
    assert is_gone(child.pid, str(int(started) - 1))
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # nobody has asked for its exit status yet
    assert is_gone(child.pid, started)
    child.wait()
    assert is_gone(child.pid, started)


def test_a_process_that_may_not_be_looked_at_is_alive(monkeypatch):
    def refuse(pid, number):
        raise PermissionError

    monkeypatch.setattr(os, "kill", refuse)
    assert not is_gone(os.getpid(), "1")


def test_a_machine_that_cannot_be_told_has_no_neighbours(ledger, monkeypatch, tmp_path):
    monkeypatch.setattr(neighbours, "PROC", tmp_path)
    alone = Neighbours(ledger, "w", 60)
    alone.announce()
    assert alone.gone() == []
    assert ledger.redis.keys("*machine*") == []
