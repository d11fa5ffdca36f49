"""`inferfleet login` against a hub on a loopback port."""

import io
import json
import os
import stat
import sys

import pytest
from fakehub import FakeHub
from huggingface_hub import constants, get_token

from inferfleet.workers import cli, cli_login


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub, a home of the tests' own and nobody logged in."""
    for name in cli_login.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "home" / "token"))
    with FakeHub({}) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        yield hub


@pytest.fixture
def run(hub, monkeypatch, capsys):
    """run(*arguments, stdin=) -> (exit code, stdout, stderr), without a terminal."""

    def call(*arguments, stdin=""):
        monkeypatch.setattr(sys, "argv", ["inferfleet", "login", *arguments])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0
        told = capsys.readouterr()
        assert "hf_" not in told.out + told.err, "a token was printed"
        return code, told.out, told.err

    return call


@pytest.mark.parametrize("how", ["flag", "pipe"])
def test_a_token_that_the_hub_knows_is_kept_for_its_owner_alone(run, how):
    # Given a token, when somebody logs in with it,
    code, out, _ = run("--token", "hf_known") if how == "flag" else run(stdin="hf_known\n")
    # then the hub has said who that is,
    assert code == 0 and out.startswith("logged in as ada (")
    # and the hub's own client finds the token, which nobody else may read.
    assert get_token() == "hf_known"
    assert stat.S_IMODE(os.stat(constants.HF_TOKEN_PATH).st_mode) == 0o600


def test_a_person_is_asked_without_echo(run, monkeypatch):
    asked = []
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(cli_login.typer, "prompt", lambda text, **how: asked.append(how) or "hf_accepted")
    monkeypatch.setattr(cli_login.sys, "stdin", terminal)
    cli_login.login()
    assert asked == [{"hide_input": True, "err": True}]
    assert get_token() == "hf_accepted"


@pytest.mark.parametrize(
    ("stdin", "code", "words"),
    [
        ("hf_wrong\n", "login_failed", "does not know this token"),
        ("", "login_failed", "no token was given"),
        ("hf_known and more\n", "login_failed", "must be one word"),
        ("hf_knöwn\n", "login_failed", "must be one word"),
    ],
)
def test_what_is_no_token_is_refused_and_not_kept(run, stdin, code, words):
    status, _, told = run(stdin=stdin)
    assert status == 1 and code in told and words in told
    assert get_token() is None


def test_a_refused_token_leaves_the_old_one(run):
    run(stdin="hf_known\n")
    assert run(stdin="hf_wrong\n")[0] == 1
    assert get_token() == "hf_known"


def test_a_hub_that_does_not_answer_is_told_from_a_wrong_token(run, hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    code, _, told = run(stdin="hf_known\n")
    assert code == 3 and "hub_unreachable" in told and "try:" in told


def test_check_says_who_is_logged_in_and_logout_forgets_it(run):
    assert run("--check")[0] == 1
    run(stdin="hf_known\n")
    code, out, _ = run("--check", "--json")
    assert code == 0
    assert json.loads(out) == {"user": "ada", "kept_in": constants.HF_TOKEN_PATH, "logged_in": True}
    code, out, _ = run("--logout")
    assert code == 0 and out.startswith("logged out: ")
    assert get_token() is None
    assert "nobody was logged in" in run("--logout")[1]


def test_a_token_in_the_environment_goes_first_and_that_is_said(run, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_accepted")
    assert "logged in as grace (HF_TOKEN)" in run("--check")[1]
    code, out, told = run(stdin="hf_known\n")
    assert code == 0 and "logged in as ada" in out
    assert "HF_TOKEN is set and goes before this login" in told
    assert get_token() == "hf_accepted"


def test_one_wish_at_a_time(run):
    assert run("--check", "--logout")[0] == 2
