"""The lines of a batch's shelf: every line that ended, in the order of their ends, each marked with the file it is of.

One row of lines serves the output file, the error file and the results so far, so no line can be in two or in none.
"""

from collections.abc import Iterator
from itertools import islice

OUTPUT, ERROR = b"O", b"E"
MARKS = {"output": OUTPUT, "error": ERROR}


def marked(line: bytes, *, output: bool) -> bytes:
    """A line without its line feed, as it stands on a shelf."""
    return (OUTPUT if output else ERROR) + line + b"\n"


def selected(data: bytes, kind: str) -> bytes:
    """What a file of this kind shows of whole marked lines; '' = a file that is no batch's, all bytes of it."""
    if not kind:
        return data
    mark = MARKS[kind]
    return b"".join(line[1:] for line in lines_of(data) if line[:1] == mark)


def lines_of(data: bytes) -> Iterator[bytes]:
    """Lines with their line feeds; only that byte ends one."""
    start = 0
    while (end := data.find(b"\n", start)) >= 0:
        yield data[start : end + 1]
        start = end + 1


def unmarked(data: bytes, start: int = 0, end: int | None = None) -> bytes:
    """Lines start to end of both files, without their marks."""
    return b"".join(line[1:] for line in islice(lines_of(data), max(0, start), end))
