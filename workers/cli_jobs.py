"""`inferfleet jobs`: list, show, wait, cancel, retry, output, lookup."""

import sys
import time
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer

from inferfleet.tasks.calls import MAX_KEY_CHARS, check_idempotency_key
from inferfleet.tasks.errors import InvalidRequest, JobNotFound, NotTerminal, OutputNotFound, from_dict
from inferfleet.tasks.lookup import MAX_KEYS
from inferfleet.tasks.names import TERMINAL
from inferfleet.workers.cli_calls import call_verb
from inferfleet.workers.cli_http import ApiClient, path_to
from inferfleet.workers.cli_options import (
    ApiKey,
    ApiUrl,
    Json,
    Limit,
    api_client,
    complete_jobs,
    complete_models,
    key_values,
)
from inferfleet.workers.cli_output import EXIT_JOB, age, out, print_facts, print_json, print_page, print_table
from inferfleet.workers.cli_saving import Target, finish, refuse_mixed
from inferfleet.workers.loading import in_units

app = typer.Typer(no_args_is_help=True, help="Look at jobs and steer them.")

#: The API holds one long poll at most this long.
POLL_SECONDS = 30
#: Keys of one file, so that it is read and checked as a whole before the first question.
MAX_FILE_KEYS = 1_000_000

JobId = Annotated[str, typer.Argument(metavar="ID", help="A job's id (job_…).", autocompletion=complete_jobs)]


@app.command("list")
def list_jobs(
    status: Annotated[str | None, typer.Option(help="Only jobs in this state, e.g. queued.")] = None,
    model: Annotated[str | None, typer.Option(help="Only jobs of this model.", autocompletion=complete_models)] = None,
    metadata: Annotated[list[str] | None, typer.Option(help="KEY=VALUE that a job must carry; repeatable.")] = None,
    after: Annotated[str | None, typer.Option(help="Start behind this job id.")] = None,
    limit: Limit = 20,
    json: Json = False,
    api_url: ApiUrl = None,
    api_key: ApiKey = None,
) -> None:
    """List jobs, newest first."""
    given, labels = {"status": status, "model": model, "after": after}, key_values(metadata)
    with api_client(api_url, api_key) as client:
        page = client.page("/v1/jobs", limit, given, labels)
    print_page(
        page,
        ("ID", "STATUS", "MODEL", "AGE", "ATTEMPTS"),
        lambda j: (j["id"], j["status"], j["model"], age(j["created_at"]), str(j["attempts"])),
        json=json,
    )


@app.command()
def show(job_id: JobId, json: Json = False, api_url: ApiUrl = None, api_key: ApiKey = None) -> None:
    """Show one job: its state, times, answer or error."""
    with api_client(api_url, api_key) as client:
        job = client.request("GET", path_of(job_id))
    print_json(job) if json else print_job(job)


@app.command()
def wait(
    job_id: JobId,
    timeout: Annotated[float | None, typer.Option(min=0, help="Give up after this many seconds.")] = None,
    json: Json = False,
    api_url: ApiUrl = None,
    api_key: ApiKey = None,
) -> None:
    """Wait until a job has ended. Exit code 0 when it completed, 5 when it did not."""
    with api_client(api_url, api_key) as client:
        job = _wait_for_end(client, job_id, timeout)
    print_json(job) if json else print_job(job)
    if job["status"] not in ("completed", "incomplete"):
        raise typer.Exit(EXIT_JOB)


def _wait_for_end(client: ApiClient, job_id: str, timeout: float | None) -> dict[str, Any]:
    """The job when it has ended or the time is over."""
    deadline = None if timeout is None else time.monotonic() + timeout
    while True:
        left = POLL_SECONDS if deadline is None else deadline - time.monotonic()
        seconds = max(0, min(POLL_SECONDS, round(left)))
        job = client.request("GET", path_of(job_id), params={"wait": str(seconds)})
        if job["status"] in TERMINAL or (deadline is not None and time.monotonic() >= deadline):
            return job


@app.command()
def cancel(job_id: JobId, json: Json = False, api_url: ApiUrl = None, api_key: ApiKey = None) -> None:
    """Cancel a job: at once while it is queued, at the next step while it runs."""
    call_verb(f"{path_of(job_id)}/cancel", json=json, api_url=api_url, api_key=api_key)


@app.command()
def retry(job_id: JobId, json: Json = False, api_url: ApiUrl = None, api_key: ApiKey = None) -> None:
    """Queue a job again that failed, expired or was cancelled."""
    call_verb(f"{path_of(job_id)}/retry", json=json, api_url=api_url, api_key=api_key)


@app.command()
def output(
    job_id: JobId,
    file: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Where to; - is stdout, default JOB_ID.png.")
    ] = None,
    index: Annotated[int | None, typer.Option(min=0, help="Only the picture with this number, from 0.")] = None,
    json: Json = False,
    api_url: ApiUrl = None,
    api_key: ApiKey = None,
) -> None:
    """Save the pictures of a job that completed; several as FILE-0, FILE-1, ..."""
    target = Target(file)
    with api_client(api_url, api_key) as client:
        job = client.request("GET", path_of(job_id))
        if job["status"] != "completed":
            raise from_dict(job["error"]) if job["error"] else NotTerminal(f"the job is {job['status']}")
        count = len(job["outputs"])
        if not 0 <= (index or 0) < count:
            wanted = "no pictures" if not count else f"{count} pictures, numbered from 0"
            raise OutputNotFound(f"{job_id} has {wanted}", param="index")
        refuse_mixed(target, json=json)
        target.check(1 if index is not None else count)
        finish(client, job, target, index, json=json)


@app.command()
def lookup(
    file: Annotated[
        typer.FileText,
        typer.Argument(metavar="FILE", help="One key a line; - is stdin.", encoding="utf-8", errors="replace"),
    ],
    missing: Annotated[bool, typer.Option("--missing", help="Print only the keys that no job has.")] = False,
    json: Json = False,
    api_url: ApiUrl = None,
    api_key: ApiKey = None,
) -> None:
    """Tell which idempotency keys have a job, as after a failover that lost the last moments.

    A key is known as long as its job is kept: until the result's time to live is over, or the job is deleted.

    Exit code 0 when every key has a job, 5 when not.
    """
    keys, found = read_keys(file), []
    with api_client(api_url, api_key) as client:
        for start in range(0, len(keys), MAX_KEYS):
            asked = {"idempotency_keys": keys[start : start + MAX_KEYS]}
            found += client.request("POST", "/v1/jobs/lookup", body=asked)["data"]
    lost = [each for each in found if each["job_id"] is None]
    shown = lost if missing else found
    if json:
        print_json({"object": "list", "data": shown})
    elif missing:
        sys.stdout.writelines(each["idempotency_key"] + "\n" for each in shown)
    else:
        rows = ((each["idempotency_key"], each["job_id"] or "-", each["status"] or "missing") for each in shown)
        print_table(("KEY", "JOB", "STATUS"), rows)
    if lost:
        raise typer.Exit(EXIT_JOB)


def read_keys(file: TextIO) -> list[str]:
    """The keys of a file, each once. Raises InvalidRequest, naming the line that holds none."""
    keys: dict[str, None] = {}
    for number, line in enumerate(iter(lambda: file.readline(MAX_KEY_CHARS + 2), ""), 1):
        key = line.removesuffix("\n")
        check_idempotency_key(key, f"line {number}")
        keys[key] = None
        if len(keys) > MAX_FILE_KEYS:
            raise InvalidRequest(f"FILE may hold at most {MAX_FILE_KEYS} keys", param="FILE")
    if not keys:
        raise InvalidRequest("FILE is empty: it holds one key a line", param="FILE")
    return list(keys)


def path_of(job_id: str) -> str:
    """A job's route. An id that could lead to another route is no job's: JobNotFound."""
    return path_to("/v1/jobs", job_id, JobNotFound)


def print_job(job: dict[str, Any]) -> None:
    """A job for a person: one line a fact, then the text of its answer."""
    facts: list[tuple[str, str]] = [
        ("id", job["id"]),
        ("status", job["status"] + (" (dead letter)" if job.get("dead_letter") else "")),
        ("model", job["model"]),
        ("created", f"{age(job['created_at'])} ago"),
        ("attempts", str(job["attempts"])),
        ("priority", str(job["priority"])),
    ]
    facts += [(name, str(value)) for name, value in (job.get("metrics") or {}).items() if value is not None]
    facts += [(name, str(value)) for name, value in (job.get("usage") or {}).items() if isinstance(value, int)]
    if progress := job.get("progress_detail"):
        facts.append(("progress", f"step {progress['step']} of {progress['steps']}"))
    facts += [(f"picture {output['index']}", _picture(output)) for output in job["outputs"]]
    if error := job.get("error"):
        facts.append(("error", f"{error['code']}: {error['message']}"))
    print_facts(facts)
    body = (job.get("response") or {}).get("body") or {}
    texts = [choice["message"]["content"] or "" for choice in body.get("choices", [])]
    texts += [part["text"] for item in body.get("output", []) for part in item["content"]]
    for text in texts:
        out.print()
        out.print(text, markup=False)


def _picture(output: dict[str, Any]) -> str:
    size = f"{output['width']}x{output['height']} {output['content_type']}, {in_units(output['size_bytes'])}"
    return f"{size}, seed {output['seed']}, {output['url']}"
