"""`inferfleet batch`: create, run, list, show, wait, cancel, retry, results. Who runs them is `inferfleet batches`."""

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from inferfleet.tasks.contracts.batches import S3_SCHEME
from inferfleet.tasks.errors import Unavailable
from inferfleet.tasks.files import FILE_ID
from inferfleet.workers.cli_batch_run import (
    LONGEST_PAUSE,
    PATIENCE_SECONDS,
    SHORTEST_PAUSE,
    Place,
    Wanted,
    batch_route,
    ended_well,
    endpoint_of,
    print_end,
    print_refusals,
    run_file,
    watch,
)
from inferfleet.workers.cli_calls import call_verb
from inferfleet.workers.cli_files import LocalFile, send_file
from inferfleet.workers.cli_http import ApiClient
from inferfleet.workers.cli_options import (
    ApiKey,
    ApiUrl,
    Json,
    Limit,
    api_client,
    complete_batches,
    complete_endpoints,
    key_values,
)
from inferfleet.workers.cli_output import EXIT_JOB, age, clock, out, print_facts, print_json, print_page

app = typer.Typer(no_args_is_help=True, help="Run files of requests, and look at what became of them.")

BatchId = Annotated[str, typer.Argument(metavar="ID", help="A batch's id (batch_…).", autocompletion=complete_batches)]
Endpoint = Annotated[str | None, typer.Option(help="What its lines ask for; default the url of the first line.")]
Window = Annotated[str, typer.Option(help="What has not ended after this expires: 90m, 24h, 7d.")]
Pairs = Annotated[list[str] | None, typer.Option(help="KEY=VALUE of the batch; repeatable.")]
Webhook = Annotated[
    str | None,
    typer.Option(help="An https URL or an endpoint's id that is told of the end.", autocompletion=complete_endpoints),
]
Priority = Annotated[int | None, typer.Option(min=-100, max=100, help="Among batches; lower runs first.")]


@app.command()
def create(
    source: Annotated[
        str,
        typer.Argument(
            metavar="FILE", help="Lines of requests (JSONL): a file, the id of an upload, or s3://bucket/key."
        ),
    ],
    endpoint: Endpoint = None,
    window: Window = "24h",
    metadata: Pairs = None,
    priority: Priority = None,
    webhook: Webhook = None,
    output_url_prefix: Annotated[
        str | None, typer.Option(metavar="S3_URL", help="Write the output there too: s3://bucket/prefix/.")
    ] = None,
    json: Json = False,
    api_url: ApiUrl = None,
    api_key: ApiKey = None,
) -> None:
    """Upload a file and start its batch; print the batch's id."""
    path, there = Path(source), bool(FILE_ID.fullmatch(source)) or source.startswith(S3_SCHEME)
    if not there and not path.is_file():
        raise typer.BadParameter(f"there is no file {source}", param_hint="FILE")
    if there and endpoint is None:
        raise typer.BadParameter(
            "what lies there already is not read here: say what its lines ask for", param_hint="--endpoint"
        )
    wanted = Wanted(endpoint or endpoint_of(path), window, key_values(metadata), priority, webhook, output_url_prefix)
    with api_client(api_url, api_key) as client:
        file_id = source if there else send_file(client, path)["id"]
        batch = client.request("POST", "/v1/batches", body=wanted.body(file_id))
    print_json(batch) if json else out.print(batch["id"], markup=False)


@app.command()
def run(
    source: LocalFile,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="OUT", help="For the answers; default FILE.output.jsonl.")
    ] = None,
    errors: Annotated[
        Path | None, typer.Option("--errors", metavar="OUT", help="For what failed; default FILE.errors.jsonl.")
    ] = None,
    endpoint: Endpoint = None,
    window: Window = "24h",
    metadata: Pairs = None,
    priority: Priority = None,
    webhook: Webhook = None,
    json: Json = False,
    api_url: ApiUrl = None,
    api_key: ApiKey = None,
) -> None:
    """Run a file and save what comes of it. Broken off, the same command goes on with the same batch.

    Exit code 0 when every line was answered, 5 when not.
    """
    answers = output or source.with_name(f"{source.stem}.output.jsonl")
    place = Place(answers, errors or answers.with_name(f"{answers.stem.removesuffix('.output')}.errors.jsonl"))
    place.check(source)
    wanted = Wanted(endpoint or endpoint_of(source), window, key_values(metadata), priority, webhook)
    with api_client(api_url, api_key) as client:
        batch = run_file(client, source, place, wanted)
    print_json(batch) if json else print_end(batch, place)
    if not ended_well(batch):
        raise typer.Exit(EXIT_JOB)


@app.command("list")
def list_batches(
    after: Annotated[str | None, typer.Option(help="Start behind this batch id.")] = None,
    limit: Limit = 20,
    json: Json = False,
    api_url: ApiUrl = None,
    api_key: ApiKey = None,
) -> None:
    """List batches, newest first."""
    with api_client(api_url, api_key) as client:
        page = client.page("/v1/batches", limit, {"after": after})
    print_page(page, ("ID", "STATUS", "LINES", "ANSWERED", "FAILED", "AGE", "ENDPOINT"), _row, json=json)


@app.command()
def show(batch_id: BatchId, json: Json = False, api_url: ApiUrl = None, api_key: ApiKey = None) -> None:
    """Show one batch: how far it is, its files, what was wrong with its input."""
    with api_client(api_url, api_key) as client:
        batch = client.request("GET", batch_route(batch_id))
    print_json(batch) if json else _print_batch(batch)


@app.command()
def wait(
    batch_id: BatchId,
    timeout: Annotated[float | None, typer.Option(min=0, help="Give up after this many seconds.")] = None,
    json: Json = False,
    api_url: ApiUrl = None,
    api_key: ApiKey = None,
) -> None:
    """Wait until a batch has ended. Exit code 0 when every line was answered, 5 when not."""
    with api_client(api_url, api_key) as client:
        batch = watch(client, batch_id, timeout)
    print_json(batch) if json else _print_batch(batch)
    if not ended_well(batch):
        raise typer.Exit(EXIT_JOB)


@app.command()
def cancel(batch_id: BatchId, json: Json = False, api_url: ApiUrl = None, api_key: ApiKey = None) -> None:
    """Cancel a batch. What has ended is kept; every other line ends in the error file."""
    call_verb(f"{batch_route(batch_id)}/cancel", json=json, api_url=api_url, api_key=api_key)


@app.command()
def retry(
    batch_id: BatchId,
    only: Annotated[list[str] | None, typer.Option(metavar="CUSTOM_ID", help="Only this line; repeatable.")] = None,
    json: Json = False,
    api_url: ApiUrl = None,
    api_key: ApiKey = None,
) -> None:
    """Run the lines of an ended batch's error file again, as a new batch; print its id."""
    with api_client(api_url, api_key) as client:
        body = {"custom_ids": only} if only else {}
        batch = client.request("POST", f"{batch_route(batch_id)}/retry", body=body)
    print_json(batch) if json else out.print(batch["id"], markup=False)


@app.command()
def results(
    batch_id: BatchId,
    offset: Annotated[int, typer.Option(min=0, help="Leave out so many lines: those that you have.")] = 0,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the batch has ended.")] = False,
    api_url: ApiUrl = None,
    api_key: ApiKey = None,
) -> None:
    """Print the lines that have ended, answered or failed, in the order of their ends (JSONL)."""
    with api_client(api_url, api_key) as client:
        _Results(client, batch_id, offset).follow() if follow else _Results(client, batch_id, offset).print_new()


class _Results:
    """What of a batch was printed. Only whole lines are, so that their count is where to go on."""

    def __init__(self, client: ApiClient, batch_id: str, offset: int) -> None:
        self._client = client
        self._path = f"{batch_route(batch_id)}/results"
        self._printed = offset

    def follow(self) -> None:
        """Until the batch has ended. An API that is away for a while is waited for."""
        pause, heard = SHORTEST_PAUSE, time.monotonic()
        while True:
            before = self._printed
            try:
                if not self.print_new():
                    return
                heard = time.monotonic()
            except Unavailable:
                if time.monotonic() - heard > PATIENCE_SECONDS:
                    raise
            pause = SHORTEST_PAUSE if self._printed > before else min(LONGEST_PAUSE, 1.5 * pause)
            time.sleep(pause)

    def print_new(self) -> bool:
        """Print what has come since; whether more will come."""
        with self._client.download(self._path, {"offset": str(self._printed)}) as (headers, pieces):
            rest = b""
            for piece in pieces:
                lines, found, rest = (rest + piece).rpartition(b"\n")
                if found:
                    sys.stdout.write((lines + found).decode())
                    sys.stdout.flush()
                    self._printed += lines.count(b"\n") + 1
            return bool(headers["x-incomplete"] == "true")


def _row(batch: dict[str, Any]) -> tuple[str, ...]:
    counts = batch["request_counts"]
    numbers = (str(counts[name]) for name in ("total", "completed", "failed"))
    return (batch["id"], batch["status"], *numbers, age(batch["created_at"]), batch["endpoint"])


def _print_batch(batch: dict[str, Any]) -> None:
    """A batch for a person: one line a fact."""
    counts, usage = batch["request_counts"], batch["usage"]
    facts = [(name, str(batch[name])) for name in ("id", "status", "endpoint", "model") if batch[name]]
    facts.append(("created", f"{age(batch['created_at'])} ago"))
    facts.append(("expires", clock(batch["expires_at"])))
    facts.append(("lines", f"{counts['total']}: {counts['completed']} answered, {counts['failed']} failed"))
    facts.append(("tokens", f"{usage['input_tokens']} read, {usage['output_tokens']} written"))
    names = ("input_file_id", "output_file_id", "error_file_id")
    facts += [(name.removesuffix("_id").replace("_", " "), batch[name]) for name in names if batch[name]]
    ours = batch["x_fleet"]
    facts += [(name.replace("_", " "), ours[name]) for name in ("input_url", "output_url", "error_url") if ours[name]]
    facts += [(f"metadata {key}", value) for key, value in (batch["metadata"] or {}).items()]
    if parent := ours["retry_of"]:
        facts.append(("retry of", parent))
    print_facts(facts)
    print_refusals(batch)
