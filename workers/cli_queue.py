"""`inferfleet queue`: list, pause, resume, purge."""

from typing import Annotated, Any
from urllib.parse import quote

import typer

from inferfleet.workers.cli_options import ApiKey, ApiUrl, Json, api_client, complete_models
from inferfleet.workers.cli_output import out, print_json, print_table

app = typer.Typer(no_args_is_help=True, help="Look at the queues of models; pause, resume and purge them.")

Model = Annotated[str, typer.Argument(help="The model whose queue it is.", autocompletion=complete_models)]


@app.command("list")
def list_queues(json: Json = False, api_url: ApiUrl = None, api_key: ApiKey = None) -> None:
    """List the queues: what waits and runs, for how long, of whom."""
    with api_client(api_url, api_key) as client:
        page = client.request("GET", "/v1/queues")
    if json:
        print_json(page)
        return
    rows = [
        (q["model"], "paused" if q["paused"] else "open", str(q["queued"]), str(q["running"]),
         f"{q['oldest_age_seconds']:.0f}s" if q["queued"] else "-",
         ", ".join(f"{tenant} {count}" for tenant, count in q["tenants"].items()) or "-")
        for q in page["data"]
    ]  # fmt: skip
    print_table(("MODEL", "STATE", "QUEUED", "RUNNING", "OLDEST", "TENANTS"), rows)


@app.command()
def pause(model: Model, json: Json = False, api_url: ApiUrl = None, api_key: ApiKey = None) -> None:
    """Start no more jobs of a model. What runs goes on, new jobs are accepted and wait."""
    _steer(model, "pause", json, api_url, api_key)


@app.command()
def resume(model: Model, json: Json = False, api_url: ApiUrl = None, api_key: ApiKey = None) -> None:
    """Start a model's jobs again."""
    _steer(model, "resume", json, api_url, api_key)


@app.command()
def purge(
    model: Model,
    tenant: Annotated[str | None, typer.Option(help="Only this tenant's jobs.")] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    json: Json = False,
    api_url: ApiUrl = None,
    api_key: ApiKey = None,
) -> None:
    """Cancel the jobs that wait for a model. What runs goes on."""
    if not yes:
        typer.confirm(f"Cancel the jobs that wait for {model}?", abort=True, err=True)
    asked = {"confirm": model} | ({} if tenant is None else {"tenant": tenant})
    cancelled, more = 0, True
    with api_client(api_url, api_key) as client:
        while more:
            step = client.request("POST", _path(model, "purge"), body=asked)
            cancelled, more = cancelled + step["cancelled"], step["more"]
    print_json(step | {"cancelled": cancelled}) if json else out.print(f"{cancelled} jobs cancelled")


def _steer(model: str, verb: str, json: bool, api_url: str | None, api_key: str | None) -> None:
    with api_client(api_url, api_key) as client:
        queue: dict[str, Any] = client.request("POST", _path(model, verb))
    state = "paused" if queue["paused"] else "open"
    told = f"{model} is {state}: {queue['queued']} wait, {queue['running']} run"
    print_json(queue) if json else out.print(told, markup=False)


def _path(model: str, verb: str) -> str:
    return f"/v1/queues/{quote(model)}/{verb}"
