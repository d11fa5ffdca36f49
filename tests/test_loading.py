"""How far the loading of models is, as logs, terminals and `inferfleet up` are told."""

import io
import json
import sys

import pytest
from fleet import until
from rich.console import Console

from inferfleet.workers import cli_report, logs
from inferfleet.workers.cli_report import JsonReport, TextReport
from inferfleet.workers.loading import BarView, Loading, LogView, view_for
from inferfleet.workers.processes import ChildFailed
from inferfleet.workers.up import Fleet, Plan


@pytest.mark.parametrize(
    ("loading", "words"),
    [
        (Loading("smoke"), "smoke"),
        (Loading("read", 0, 4096), "read 0 bytes of 4 KiB (0%)"),
        (Loading("download", int(12.3 * 2**30), 60 << 30), "download 12.3 GiB of 60 GiB (20%)"),
    ],
)
def test_a_phase_is_told_with_its_measure_if_it_has_one(loading, words):
    assert str(loading) == words
    assert Loading.of(loading.to_dict()) == loading


def test_a_log_gets_an_event_for_each_phase_and_not_for_each_word(monkeypatch):
    stream = io.StringIO()
    logs.configure("info", "json", stream)
    view = LogView()
    for done in range(100):
        view.show("m", Loading("read", done, 100))
    view.show("m", Loading("smoke"))
    events = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [(e["event"], e["phase"], e["done"], e["total"]) for e in events] == [
        ("model_loading", "read", 0, 100),
        ("model_loading", "smoke", 0, 0),
    ]
    assert events[0]["model"] == "m" and events[0]["percent"] == 0


def test_a_terminal_gets_bars_that_leave_when_the_models_have_arrived():
    screen = io.StringIO()
    view = BarView(Console(file=screen, force_terminal=True, width=100))
    view.show("one", Loading("read", 1 << 30, 4 << 30))
    view.show("two", Loading("engine"))
    view.show("one", Loading("read", 3 << 30, 4 << 30))
    until(lambda: "read 3 GiB of 4 GiB (75%)" in screen.getvalue() and "engine" in screen.getvalue())
    view.end("one")
    view.end("two")
    view.end("two")
    assert view._bars is None


def test_without_a_terminal_or_with_json_wanted_there_are_no_bars(monkeypatch):
    assert isinstance(view_for("auto"), LogView)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert isinstance(view_for("json"), LogView)
    assert isinstance(view_for("auto"), BarView)


def test_log_lines_go_to_whatever_stands_for_stderr_at_the_time(monkeypatch):
    # Given a log on the standard error, when a drawing program replaces that for a while,
    logs.configure("info", "json")
    above = io.StringIO()
    monkeypatch.setattr(sys, "stderr", above)
    logs.get("worker").info("above_the_bars")
    # then lines go through it.
    assert "above_the_bars" in above.getvalue()


def test_up_tells_a_program_or_a_pipe_only_of_loads_that_take_longer_than_a_moment(monkeypatch, capsys):
    monkeypatch.setattr(cli_report, "LINE_SECONDS", 0.0)
    for report in (JsonReport(), TextReport()):
        report.loading("m", Loading("read", 1 << 20, 4 << 20))
        report.loading("m", None)
    as_json, as_text = capsys.readouterr().out.splitlines()
    assert json.loads(as_json) == {"loading": "m", "phase": "read", "done": 1 << 20, "total": 4 << 20, "percent": 25}
    assert as_text == "model m: read 1 MiB of 4 MiB (25%)"

    monkeypatch.undo()
    for report in (JsonReport(), TextReport()):
        report.loading("m", Loading("read", 1 << 20, 4 << 20))
    assert capsys.readouterr().out == ""


class Heard:
    """A report that remembers."""

    def __init__(self):
        self.loadings, self.phases = [], []

    def phase(self, name, seconds, detail):
        self.phases.append(name)

    def note(self, text): ...

    def loading(self, model, loading):
        self.loadings.append(None if loading is None else str(loading))


class Cards:
    """A ledger that has another card at each look; the last one stays."""

    def __init__(self, *cards):
        self.left = list(cards)

    def cards(self):
        return {"m": self.left.pop(0) if len(self.left) > 1 else self.left[0]}


class Worker:
    """A worker that lives."""

    started = 0.0

    def check(self): ...

    def tail(self):
        return "its last lines"


@pytest.fixture
def fleet(tmp_path):
    return Fleet(Plan(tmp_path, {}, "127.0.0.1", 8000, None, "test", 1.0), Heard())


def at(done):
    return {"state": "loading", "loading": Loading("read", done << 20, 4 << 20).to_dict()}


def test_up_shows_how_far_a_model_is_and_waits_for_it_as_long_as_it_moves(fleet, monkeypatch):
    # Given a model whose every move takes less than the patience, and all of them more,
    monkeypatch.setattr("inferfleet.workers.up.LOOK_SECONDS", 0.02)
    monkeypatch.setattr("inferfleet.workers.up.LOAD_SECONDS", 0.06)
    moves = [card for done in range(4) for card in [at(done)] * 2]
    fleet._await_model(Worker(), Cards({}, *moves, {"state": "ready"}), "m", "path")
    assert fleet.report.phases == ["model m"]
    assert fleet.report.loadings == [None, *(f"read {d} {u} of 4 MiB ({25 * d}%)" for d, u in STEPS), None]


STEPS = [(0, "bytes"), (1, "MiB"), (2, "MiB"), (3, "MiB")]


def test_up_gives_up_on_a_model_that_stands_still(fleet, monkeypatch):
    monkeypatch.setattr("inferfleet.workers.up.LOAD_SECONDS", 0.1)
    with pytest.raises(ChildFailed, match=r"model m has not moved for .*\nits last lines"):
        fleet._await_model(Worker(), Cards(at(1)), "m", "path")
    assert fleet.report.loadings[-1] is None


def test_up_ends_at_once_when_a_model_cannot_be_loaded(fleet):
    failed = {"state": "failed", "error": {"message": "no safetensors"}}
    with pytest.raises(ChildFailed, match="cannot be loaded: no safetensors"):
        fleet._await_model(Worker(), Cards(at(1), failed), "m", "path")
