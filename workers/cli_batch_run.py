"""`inferfleet batch run`: from a file of requests to a file of answers, and on from where it was broken off.

What belongs to a run stands in OUT.batch beside the output, from before anything is sent until everything is saved: the
key under which the upload and the batch are created once, however often they are tried, and the id of the batch.
"""

import hashlib
import json
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from inferfleet.tasks.batches import TERMINAL
from inferfleet.tasks.errors import BatchNotFound, Conflict, NotFound, RequestError, Unavailable
from inferfleet.workers.cli_files import save_file, send_file
from inferfleet.workers.cli_http import ApiClient, path_to
from inferfleet.workers.cli_output import err, out
from inferfleet.workers.cli_saving import check_writable, write_whole

#: Seconds between two looks at a batch that runs; longer the longer it has run.
SHORTEST_PAUSE, LONGEST_PAUSE = 0.1, 2.0
#: An API or a ledger that is away for less than this does not end a wait.
PATIENCE_SECONDS = 60.0
READ_BYTES = 1 << 20
#: A first line longer than this is no request: a batch's lines have their own limit.
FIRST_LINE_BYTES = 64 << 20


class OtherBatch(Conflict):
    """A batch that was broken off is to be written to the same file."""

    code = "other_batch"


@dataclass(frozen=True)
class Wanted:
    """The body that makes a batch, without its input."""

    endpoint: str
    completion_window: str
    metadata: dict[str, str]
    priority: int | None
    webhook: str | None
    output_url_prefix: str | None = None

    def body(self, file_id: str) -> dict[str, Any]:
        given = {name: value for name, value in asdict(self).items() if value not in (None, {})}
        return {"input_file_id": file_id, **given}


@dataclass(frozen=True)
class Begun:
    """What OUT.batch holds."""

    key: str
    #: SHA-256 over the input and what was wanted of it.
    asked: str
    batch_id: str | None = None


@dataclass(frozen=True)
class Place:
    """Where a run writes."""

    output: Path
    errors: Path

    @property
    def state(self) -> Path:
        return self.output.with_name(self.output.name + ".batch")

    def check(self, source: Path) -> None:
        """Complains now about what would fail at the end. Raises typer.BadParameter."""
        for path, option in ((self.output, "-o"), (self.errors, "--errors")):
            check_writable(path, option)
            if path.exists() and path.samefile(source):
                raise typer.BadParameter(f"{path} is the input", param_hint=option)
        if self.output.absolute() == self.errors.absolute():
            raise typer.BadParameter("answers and errors go to two files", param_hint="--errors")

    def begin(self, asked: str) -> Begun:
        """The run that was broken off here, else a new one. Raises OtherBatch."""
        try:
            begun = Begun(**json.loads(self.state.read_bytes()))
        except FileNotFoundError:
            begun = Begun(f"cli-{secrets.token_hex(16)}", asked)
            self.keep(begun)
        except (OSError, ValueError, TypeError):
            raise OtherBatch(f"{self.state} cannot be read as what a run left") from None
        if begun.asked != asked:
            about = f" ({begun.batch_id})" if begun.batch_id else ""
            raise OtherBatch(f"{self.state} belongs to a batch{about} of another input or with other options")
        return begun

    def keep(self, begun: Begun) -> None:
        write_whole(self.state, json.dumps(asdict(begun)).encode())


class View(Protocol):
    """Whoever is shown how a batch stands."""

    def show(self, batch: dict[str, Any]) -> None:
        """It was looked at."""


class LineView:
    """For whoever reads a pipe: a line a status, on stderr."""

    def __init__(self) -> None:
        self._last = ""

    def show(self, batch: dict[str, Any]) -> None:
        if batch["status"] != self._last:
            self._last = batch["status"]
            err.print(f"{batch['id']} {self._last}", markup=False)


class TerminalView:
    """A bar of the lines that have ended."""

    def __init__(self, bar: Progress) -> None:
        self._bar = bar
        self._task = bar.add_task("submitted", total=None)

    def show(self, batch: dict[str, Any]) -> None:
        counts = batch["request_counts"]
        failed = f", {counts['failed']} failed" if counts["failed"] else ""
        self._bar.update(
            self._task, description=batch["status"].replace("_", " ") + failed, total=counts["total"] or None,
            completed=counts["completed"] + counts["failed"],
        )  # fmt: skip


@contextmanager
def view_for_stderr() -> Iterator[View]:
    """A bar on a terminal, gone at the end; lines elsewhere."""
    if not err.is_terminal:
        yield LineView()
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(compact=True))
    with Progress(*columns, console=err, transient=True) as bar:
        yield TerminalView(bar)


def batch_route(batch_id: str) -> str:
    """A batch's route. Raises BatchNotFound for what can be no id."""
    return path_to("/v1/batches", batch_id, BatchNotFound)


def endpoint_of(source: Path) -> str:
    """The url of the first line. Raises typer.BadParameter where that is no request."""
    with source.open("rb") as file:
        first = file.readline(FIRST_LINE_BYTES)
    try:
        line = json.loads(first)
    except ValueError:
        line = None
    if not isinstance(line, dict) or not isinstance(line.get("url"), str):
        raise typer.BadParameter(
            f"the first line of {source} is no request with a url: give --endpoint", param_hint="FILE"
        )
    url: str = line["url"]
    return url


def run_file(client: ApiClient, source: Path, place: Place, wanted: Wanted) -> dict[str, Any]:
    """Uploads, creates, waits, saves; goes on from where an earlier run with the same output was broken off.

    The batch, ended. Raises OtherBatch, CannotWrite and what the API answers.
    """
    begun = place.begin(_digest(source, wanted))
    if begun.batch_id is None:
        begun = _create(client, source, place, wanted, begun)
    else:
        err.print(f"[dim]going on with {begun.batch_id}[/]")
    batch_id = str(begun.batch_id)
    try:
        batch = watch(client, batch_id)
    except BatchNotFound:
        raise BatchNotFound(
            f"{batch_id}, which {place.state} names, is not there: remove that file to start anew"
        ) from None
    except KeyboardInterrupt:
        err.print(
            f"[dim]the batch goes on: the same command waits for it, inferfleet batch cancel {batch_id} ends it[/]"
        )
        raise
    if batch["status"] != "failed":
        for file_id, path in ((batch["output_file_id"], place.output), (batch["error_file_id"], place.errors)):
            save_file(client, file_id, path) if file_id else write_whole(path, b"")
    place.state.unlink(missing_ok=True)
    return batch


def _create(client: ApiClient, source: Path, place: Place, wanted: Wanted, begun: Begun) -> Begun:
    """The run, with its batch. If that is refused, nothing was begun; if no answer came, it can be tried again."""
    try:
        file = send_file(client, source, key=f"{begun.key}-file")
        headers = {"idempotency-key": f"{begun.key}-batch"}
        made = client.request("POST", "/v1/batches", body=wanted.body(file["id"]), headers=headers)
    except (RequestError, NotFound):
        place.state.unlink(missing_ok=True)
        raise
    created = replace(begun, batch_id=made["id"])
    place.keep(created)
    return created


def watch(client: ApiClient, batch_id: str, timeout: float | None = None) -> dict[str, Any]:
    """The batch when it has ended or the time is over. An API that is away for a while is waited for."""
    begun = seen = time.monotonic()
    pause = SHORTEST_PAUSE
    with view_for_stderr() as view:
        while True:
            try:
                batch = client.request("GET", batch_route(batch_id))
                seen = time.monotonic()
                view.show(batch)
                if batch["status"] in TERMINAL or (timeout is not None and seen - begun >= timeout):
                    return batch
            except Unavailable:
                if time.monotonic() - seen > PATIENCE_SECONDS:
                    raise
            left = pause if timeout is None else max(0.0, timeout - (time.monotonic() - begun))
            time.sleep(min(pause, left))
            pause = min(LONGEST_PAUSE, 1.2 * pause)


def print_end(batch: dict[str, Any], place: Place) -> None:
    """Where everything is now."""
    counts = batch["request_counts"]
    if batch["status"] == "failed":
        err.print(f"[bold red]error:[/] {batch['id']} was refused: the input is no batch")
        print_refusals(batch)
        return
    out.print(f"{batch['id']} {batch['status']}", markup=False)
    out.print(f"{counts['completed']} of {counts['total']} answered  {place.output}", markup=False, soft_wrap=True)
    out.print(f"{counts['failed']} in the error file  {place.errors}", markup=False, soft_wrap=True)


def print_refusals(batch: dict[str, Any]) -> None:
    """What is wrong with an input, a line each."""
    for wrong in (batch.get("errors") or {}).get("data", []):
        where = f"line {wrong['line']}: " if wrong.get("line") is not None else ""
        param = f" ({wrong['param']})" if wrong.get("param") else ""
        err.print(f"  {where}{wrong['message']}{param}", markup=False)


def ended_well(batch: dict[str, Any]) -> bool:
    """Every line was answered."""
    return batch["status"] == "completed" and not batch["request_counts"]["failed"]


def _digest(source: Path, wanted: Wanted) -> str:
    digest = hashlib.sha256(json.dumps(asdict(wanted), sort_keys=True).encode())
    with source.open("rb") as file:
        while data := file.read(READ_BYTES):
            digest.update(data)
    return digest.hexdigest()
