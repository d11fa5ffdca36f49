"""`inferfleet dead-letters`: list, show, replay, delete."""

from typing import Annotated

import typer

from inferfleet.tasks.errors import JobNotFound
from inferfleet.workers.cli_calls import call_verb, delete_one
from inferfleet.workers.cli_http import path_to
from inferfleet.workers.cli_jobs import JobId, print_job
from inferfleet.workers.cli_options import ApiKey, ApiUrl, Json, Limit, api_client, complete_models
from inferfleet.workers.cli_output import age, clock, out, print_json, print_page, print_table

app = typer.Typer(no_args_is_help=True, help="Look at jobs that took down every worker that tried them.")


@app.command("list")
def list_dead_letters(
    model: Annotated[str | None, typer.Option(help="Only jobs of this model.", autocompletion=complete_models)] = None,
    after: Annotated[str | None, typer.Option(help="Start behind this job id.")] = None,
    limit: Limit = 20,
    json: Json = False,
    api_url: ApiUrl = None,
    api_key: ApiKey = None,
) -> None:
    """List dead letters, newest first."""
    with api_client(api_url, api_key) as client:
        page = client.page("/v1/dead_letters", limit, {"model": model, "after": after})
    print_page(
        page,
        ("ID", "MODEL", "DIED", "ATTEMPTS"),
        lambda j: (j["id"], j["model"], age(j["failed_at"]), str(j["attempts"])),
        json=json,
    )


@app.command()
def show(job_id: JobId, json: Json = False, api_url: ApiUrl = None, api_key: ApiKey = None) -> None:
    """Show one: the job, and the worker, times and death of each attempt."""
    with api_client(api_url, api_key) as client:
        letter = client.request("GET", letter_route(job_id))
    if json:
        print_json(letter)
        return
    print_job(letter["job"])
    out.print()
    rows = [
        (str(a["attempt"]), clock(a["ended_at"]), f"{a['ended_at'] - a['started_at']:.1f}s", a["outcome"], a["worker"],
         a["reason"] or "-")
        for a in letter["attempts"]
    ]  # fmt: skip
    print_table(("ATTEMPT", "DIED AT", "AFTER", "OUTCOME", "WORKER", "REASON"), rows)


@app.command()
def replay(job_id: JobId, json: Json = False, api_url: ApiUrl = None, api_key: ApiKey = None) -> None:
    """Queue one again, once what killed its workers is mended."""
    call_verb(f"{letter_route(job_id)}/replay", json=json, api_url=api_url, api_key=api_key)


@app.command()
def delete(job_id: JobId, json: Json = False, api_url: ApiUrl = None, api_key: ApiKey = None) -> None:
    """Forget one."""
    delete_one(letter_route(job_id), json=json, api_url=api_url, api_key=api_key)


def letter_route(job_id: str) -> str:
    """A dead letter's route. Raises JobNotFound for what can be no id."""
    return path_to("/v1/dead_letters", job_id, JobNotFound)
