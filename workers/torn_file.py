"""Mends an append-only file whose last write was cut by a kill, a power cut or a full disk. Run before the server.

What a script writes stands in the file as MULTI, its commands, EXEC. Redis 7.0 that meets the end of its file inside a
command cuts behind the last whole one, which may be inside a MULTI, and goes on writing there: its next start runs the
half of a script together with the next whole one, or loses what came after it alone. Valkey 9.1 cuts before the MULTI.
"""

import mmap
import re
import subprocess
from pathlib import Path

from inferfleet.tasks.errors import SetupError

#: Where the file of one server is: in parts that a manifest lists (Redis 7 and Valkey), or alone (Redis 6.2).
MANIFEST = "appendonlydir/appendonly.aof.manifest"
ALONE = "appendonly.aof"
#: What comes last in the manifest is what was written last.
PART = re.compile(r"^file (\S+) seq \d+ type i", re.MULTILINE)
#: What the checker says of each file; without a name where there is only one.
CHECKED = re.compile(r"AOF analyzed: (?:filename=(\S+), )?size=\d+, ok_up_to=(\d+)")
LENGTH = re.compile(rb"[*$](\d{1,10})\r\n")
CUT_LENGTH = re.compile(rb"(\r?\n?|[*$]\d{0,10}\r?)")


class _Cut(Exception):
    """The file ends inside a command."""


def mend(binary: str, folder: Path, seconds: float) -> int:
    """Takes an unfinished command, or an unfinished MULTI, from the end of the file of the server in `folder`.

    binary: the server's, which is its own checker under another name; seconds: its patience with a long file.
    Answers how many bytes were taken off. A file that is damaged anywhere else is left alone, for the server to refuse.
    Raises SetupError when the file cannot be written, or the check does not end.
    """
    path = _last_part(folder)
    if not path.exists() or path.stat().st_size == 0:
        return 0
    # Of a part by way of the manifest: the checker takes any other file with a line that begins with "file" for one, as
    # those of jobs about files have.
    shown = path if path.name == ALONE else folder / MANIFEST
    checked = {Path(name or ALONE).name: int(good) for name, good in CHECKED.findall(_report(binary, shown, seconds))}
    end, start = path.stat().st_size, checked.get(path.name)
    if start is None:  # not a checker at all, or what comes before is damaged
        return 0
    if start >= end or not _is_unfinished(path, start):
        return 0
    try:
        with path.open("r+b") as file:
            file.truncate(start)
    except OSError as error:
        raise SetupError(f"cannot mend {path}: {error.strerror}", param="data_dir") from None
    return end - start


def _report(binary: str, path: Path, seconds: float) -> str:
    """What the checker says; it reads alone."""
    command = ["redis-check-aof", str(path)]
    try:
        done = subprocess.run(
            command, executable=binary, stdin=subprocess.DEVNULL, capture_output=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        raise SetupError(f"the check of {path} did not end within {seconds:.0f} s", param="data_dir") from None
    return done.stdout.decode(errors="replace")


def _last_part(folder: Path) -> Path:
    """It may not be there."""
    manifest = folder / MANIFEST
    parts = PART.findall(manifest.read_text()) if manifest.exists() else []
    return manifest.with_name(parts[-1]) if parts else folder / ALONE


def _is_unfinished(path: Path, start: int) -> bool:
    """Whether the file ends inside the one command or MULTI that begins at `start`, with nothing wrong before that."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        at, names = start, []
        try:
            while at < len(data):
                name, at = _command(data, at)
                names.append(name)
                if names.count(b"MULTI") != 1 or name == b"EXEC":
                    return False
        except _Cut:
            return True
        except ValueError:
            return False
        return True


def _command(data: mmap.mmap, at: int) -> tuple[bytes, int]:
    """A command's name, and where the next begins. Raises _Cut, ValueError."""
    count, at = _length(data, at, b"*")
    name = b""
    for number in range(count):
        size, at = _length(data, at, b"$")
        if at + size + 2 > len(data):
            raise _Cut
        if number == 0:
            name = data[at : at + size].upper()
        if data[at + size : at + size + 2] != b"\r\n":
            raise ValueError("no line ends here")
        at += size + 2
    return name, at


def _length(data: mmap.mmap, at: int, sign: bytes) -> tuple[int, int]:
    found = LENGTH.match(data, at)
    if found is None:
        if CUT_LENGTH.fullmatch(data, at):
            raise _Cut
        raise ValueError("no length stands here")
    if data[at : at + 1] != sign:
        raise ValueError("a length of something else stands here")
    return int(found[1]), found.end()
