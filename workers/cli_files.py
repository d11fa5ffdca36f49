"""`inferfleet files`: upload, list, show, content, delete."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Annotated, Any

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from inferfleet.tasks.errors import FileNotFound
from inferfleet.workers.cli_calls import delete_one
from inferfleet.workers.cli_http import ApiClient, path_to
from inferfleet.workers.cli_options import ApiKey, ApiUrl, Json, api_client, complete_files
from inferfleet.workers.cli_output import age, err, out, print_facts, print_json, print_page
from inferfleet.workers.cli_saving import STDOUT, check_writable, write_pieces
from inferfleet.workers.loading import in_units

app = typer.Typer(no_args_is_help=True, help="Files of batches: what they read and what they wrote.")

FileId = Annotated[str, typer.Argument(metavar="ID", help="A file's id (file-…).", autocompletion=complete_files)]
LocalFile = Annotated[
    Path, typer.Argument(metavar="FILE", help="Lines of requests (JSONL).", exists=True, dir_okay=False, readable=True)
]


class _Watched:
    """A file that tells how much of it was read."""

    def __init__(self, file: IO[bytes], told: Callable[[int], Any]) -> None:
        self._file, self._told = file, told

    def fileno(self) -> int:
        return self._file.fileno()

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self._told(len(data))
        return data


@app.command()
def upload(
    file: LocalFile,
    expires_after: Annotated[
        int | None, typer.Option(metavar="SECONDS", min=3600, max=30 * 86400, help="Forget it then; default 30 days.")
    ] = None,
    json: Json = False,
    api_url: ApiUrl = None,
    api_key: ApiKey = None,
) -> None:
    """Upload the input of a batch and print its id."""
    with api_client(api_url, api_key) as client:
        made = send_file(client, file, expires_after=expires_after)
    print_json(made) if json else out.print(made["id"], markup=False)


@app.command("list")
def list_files(
    after: Annotated[str | None, typer.Option(help="Start behind this file id.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="How many at most.")] = 20,
    json: Json = False,
    api_url: ApiUrl = None,
    api_key: ApiKey = None,
) -> None:
    """List files, newest first."""
    with api_client(api_url, api_key) as client:
        page = client.page("/v1/files", limit, {"after": after})
    print_page(
        page,
        ("ID", "PURPOSE", "SIZE", "AGE", "NAME"),
        lambda f: (f["id"], f["purpose"], in_units(f["bytes"]), age(f["created_at"]), f["filename"]),
        json=json,
    )


@app.command()
def show(file_id: FileId, json: Json = False, api_url: ApiUrl = None, api_key: ApiKey = None) -> None:
    """Show one file, without its content."""
    with api_client(api_url, api_key) as client:
        file = client.request("GET", file_route(file_id))
    print_json(file) if json else print_facts((name, str(file[name])) for name in file if file[name] is not None)


@app.command()
def content(
    file_id: FileId,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="Where to; - is stdout.")] = STDOUT,
    api_url: ApiUrl = None,
    api_key: ApiKey = None,
) -> None:
    """Print or save a file. A file that is written is whole or not there."""
    if output != STDOUT:
        check_writable(output, "-o")
    with api_client(api_url, api_key) as client:
        if output != STDOUT:
            save_file(client, file_id, output)
            return
        with client.download(f"{file_route(file_id)}/content") as (_, pieces):
            sys.stdout.flush()
            sys.stdout.buffer.writelines(pieces)
            sys.stdout.buffer.flush()


@app.command()
def delete(file_id: FileId, json: Json = False, api_url: ApiUrl = None, api_key: ApiKey = None) -> None:
    """Forget a file."""
    delete_one(file_route(file_id), json=json, api_url=api_url, api_key=api_key)


def file_route(file_id: str) -> str:
    """A file's route. Raises FileNotFound for what can be no id."""
    return path_to("/v1/files", file_id, FileNotFound)


def send_file(
    client: ApiClient, path: Path, *, expires_after: int | None = None, key: str | None = None
) -> dict[str, Any]:
    """Uploads a batch's input, with a bar on a terminal. Sent again under the same key it is still one file."""
    fields = {"purpose": "batch"}
    if expires_after is not None:
        fields |= {"expires_after[anchor]": "created_at", "expires_after[seconds]": str(expires_after)}
    headers = {"idempotency-key": key} if key else None
    with path.open("rb") as file, _bar(path) as told:
        watched: Any = _Watched(file, told)
        return client.upload("/v1/files", path.name, watched, fields, headers)


def save_file(client: ApiClient, file_id: str, path: Path) -> None:
    """Raises CannotWrite and what the API answers."""
    with client.download(f"{file_route(file_id)}/content") as (_, pieces):
        write_pieces(path, pieces)


@contextmanager
def _bar(path: Path) -> Iterator[Callable[[int], Any]]:
    """Told of each piece that went."""
    columns = (TextColumn("uploading"), BarColumn(), DownloadColumn(), TimeRemainingColumn(compact=True))
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task("", total=path.stat().st_size)
        yield lambda size: bar.advance(task, size)
