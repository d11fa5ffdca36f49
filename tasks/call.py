"""What a question to the ledger is made of, without a connection: a script, its arguments, how its answer is read.

A `Call` is one round trip. A `Steps` generator yields Calls, is sent their answers and returns the result; the sync
and the async ledger differ only in how they carry a Call. Every call may be sent twice: a lost reply changes nothing.
"""

import functools
import hashlib
import json
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from inferfleet.tasks.errors import BY_CODE

T = TypeVar("T")
Arg = str | bytes | int | float
Steps = Generator["Call[Any]", Any, T]

SCRIPTS = Path(__file__).parent / "lua"

#: What stands in front of a script.
USUAL = ("records", "queue", "outbox", "quotas")
#: First word of a script's name -> what stands in front of it, where that is something else.
SHARED = {
    "file": ("records", "shelf"),
    "batch": ("records", "queue", "outbox", "shelf", "batches"),
    "run": ("records", "runs"),
}


@dataclass(frozen=True)
class Call(Generic[T]):
    """One round trip: a script of tasks/lua, or a plain command where `script` is empty."""

    script: str
    args: Sequence[Arg]
    parse: Callable[[Any], T]


@functools.cache
def script_text(name: str) -> str:
    """The whole Lua text of a script: the errors as JSON, what it shares with others, the script itself."""
    codes = ("deadline_exceeded", "start_timeout", "worker_lost", "cancelled")
    errors = ", ".join(f"{code} = [==[{json.dumps(BY_CODE[code]().to_dict())}]==]" for code in codes)
    shared = SHARED.get(name.partition("_")[0], USUAL)
    parts = [(SCRIPTS / f"{part}.lua").read_text() for part in (*shared, name)]
    return f"local ERRORS = {{{errors}}}\n" + "\n".join(parts)


@functools.cache
def script_sha(name: str) -> str:
    return hashlib.sha1(script_text(name).encode(), usedforsecurity=False).hexdigest()


def opt(value: Arg | None) -> Arg:
    """Absent values travel as an empty string."""
    return "" if value is None else value


def to_json(value: Any) -> str:
    return "" if value is None else json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def text(value: bytes) -> str:
    return value.decode()


def integer(value: bytes | int | None) -> int | None:
    return None if value in (b"", None) else int(value)


def from_json(value: bytes | None) -> Any:
    return json.loads(value) if value else None


class Key(str):
    """An argument of a plain command that gets the namespace's prefix."""
