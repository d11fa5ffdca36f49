"""The command line as a shell calls it, in this process."""

import io
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from live_api import LiveApi

from inferfleet.workers import cli


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str

    @property
    def json(self):
        return json.loads(self.out)


def shell(
    api: LiveApi, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path
) -> Callable[..., Ran]:
    """run("jobs", "list") in a folder of its own, without a terminal, against `api`."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("INFERFLEET_API_URL", api.url)
    monkeypatch.setenv("INFERFLEET_REDIS_URL", api.settings.redis_url)
    monkeypatch.setenv("INFERFLEET_NAMESPACE", api.settings.namespace)
    monkeypatch.setenv("INFERFLEET_DATA_DIR", str(folder / "data"))

    def call(*arguments: str, stdin: str = "") -> Ran:
        monkeypatch.setattr(sys, "argv", ["inferfleet", *arguments])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capsys.readouterr()
        return Ran(int(ended.value.code or 0), printed.out, printed.err)

    return call
