"""What the command line shows while a picture is painted: its place in the queue, a bar of its steps, previews."""

import base64
import binascii
import io
import sys
from typing import Any, Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.style import Style
from rich.text import Text

from inferfleet.workers.cli_output import err

#: A preview is at most so many cells wide; each shows two pixels, one above the other.
PREVIEW_COLUMNS = 48
#: Lines of the terminal that a preview leaves free.
FREE_LINES = 4
UPPER_HALF = "▀"


class View(Protocol):
    """Whoever is shown it."""

    def waits(self, job: dict[str, Any]) -> None:
        """It stands in the queue."""

    def step(self, step: int, steps: int) -> None:
        """Steps done and to do, over all pictures."""

    def preview(self, event: dict[str, Any]) -> None:
        """A small picture of how one stands."""

    def close(self) -> None:
        """It has ended."""


class LineView:
    """For whoever reads a pipe: nothing but a line for each preview."""

    def waits(self, job: dict[str, Any]) -> None: ...

    def step(self, step: int, steps: int) -> None: ...

    def preview(self, event: dict[str, Any]) -> None:
        err.print(f"preview of picture {event['index']} after step {event['step']}", markup=False)

    def close(self) -> None: ...


class TerminalView:
    """A bar, and above it the last preview; both are gone when the picture is there."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = Progress(
            TextColumn("{task.description}", markup=False), BarColumn(), TextColumn("{task.fields[detail]}"),
            TimeRemainingColumn(compact=True), console=console,
        )  # fmt: skip
        self._task = self._bar.add_task("submitted", total=None, detail="")
        self._picture: Text | None = None
        self._live = Live(self._shown(), console=console, transient=True, refresh_per_second=8)
        self._live.start()

    def waits(self, job: dict[str, Any]) -> None:
        ahead = job.get("queue_position")
        detail = "" if ahead is None else "next" if ahead == 0 else f"{ahead} ahead"
        if ahead and job.get("eta_seconds") is not None:
            detail += f", about {job['eta_seconds']:.0f} s"
        self._bar.update(self._task, description="queued", detail=detail, total=None)

    def step(self, step: int, steps: int) -> None:
        self._bar.update(
            self._task, description="painting", completed=step, total=steps, detail=f"step {step} of {steps}"
        )

    def preview(self, event: dict[str, Any]) -> None:
        rows = max(2, self._console.height - FREE_LINES)
        picture = half_blocks(event.get("b64_json", ""), min(PREVIEW_COLUMNS, self._console.width - 1), rows)
        if picture is not None:
            self._picture = picture
            self._live.update(self._shown())

    def close(self) -> None:
        self._live.stop()

    def _shown(self) -> Group:
        return Group(self._bar) if self._picture is None else Group(self._picture, self._bar)


def view_for_stderr() -> View:
    """Bars go to stderr: stdout may be a file or a pipe that wants the picture."""
    return TerminalView(err) if sys.stderr.isatty() and err.is_terminal else LineView()


def check_previews() -> None:
    """Previews on a terminal are drawn with Pillow, which the bare install lacks. Raises ModuleNotFoundError."""
    import PIL  # noqa: F401


def half_blocks(encoded: str, columns: int, rows: int) -> Text | None:
    """A picture of at most `columns` by `rows` cells, base64 of a file in any format; None if it is damaged.

    A cell is about twice as high as wide, so its two halves are square pixels: the upper one is the character's colour,
    the lower one the background's.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(base64.b64decode(encoded, validate=True))) as opened:
            scale = min(columns / opened.width, 2 * rows / opened.height)
            width, height = max(1, round(opened.width * scale)), max(1, round(opened.height * scale / 2))
            pixels = opened.convert("RGB").resize((width, 2 * height)).tobytes()
    except (binascii.Error, OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    colour = [f"#{pixels[at : at + 3].hex()}" for at in range(0, len(pixels), 3)]
    text = Text()
    for row in range(height):
        upper, lower = 2 * row * width, (2 * row + 1) * width
        for column in range(width):
            text.append(UPPER_HALF, Style(color=colour[upper + column], bgcolor=colour[lower + column]))
        text.append("\n")
    return text
