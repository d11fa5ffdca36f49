"""A batch's input on this machine's disk, so that its lines can be read in any order without being held in memory."""

import tempfile
from array import array
from collections.abc import Iterator


class Spool:
    """A nameless temporary file; `with` gives the disk back."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="inferfleet-batch-")  # noqa: SIM115 - closed by __exit__
        self._starts = array("Q")
        self._lengths = array("L")

    def __enter__(self) -> "Spool":
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()

    def write(self, data: bytes) -> None:
        self._file.write(data)

    def scan(self, max_line: int) -> Iterator[tuple[int, bytes]]:
        """Every line that is not blank, with its number in the file from 1; one that is longer than max_line is cut
        there. `line` counts them in this order, from 0; it may be asked once this has ended."""
        self._file.seek(0)
        place, number = 0, 0
        while raw := self._file.readline(max_line + 1):
            number += 1
            start, place = place, place + len(raw)
            if not raw.endswith(b"\n") and len(raw) > max_line:
                place += self._skip_line()
            if raw.strip():
                self._starts.append(start)
                self._lengths.append(len(raw))
                yield number, raw

    def _skip_line(self) -> int:
        skipped = 0
        while rest := self._file.readline(1 << 20):
            skipped += len(rest)
            if rest.endswith(b"\n"):
                break
        return skipped

    def line(self, index: int) -> bytes:
        """A line that `scan` gave."""
        self._file.seek(self._starts[index])
        return self._file.read(self._lengths[index])
