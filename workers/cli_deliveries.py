"""`inferfleet deliveries`: what became of webhooks: list, show, replay."""

from typing import Annotated, Any

import typer

from inferfleet.tasks.errors import DeliveryNotFound
from inferfleet.workers.cli_calls import call_verb
from inferfleet.workers.cli_http import path_to
from inferfleet.workers.cli_options import (
    ApiKey,
    ApiUrl,
    Json,
    Limit,
    api_client,
    complete_batches,
    complete_endpoints,
    complete_jobs,
)
from inferfleet.workers.cli_output import age, print_facts, print_json, print_page

app = typer.Typer(no_args_is_help=True, help="What became of webhooks.")

DeliveryId = Annotated[str, typer.Argument(metavar="ID", help="A delivery's id (whd_…).")]


@app.command("list")
def list_deliveries(
    endpoint: Annotated[
        str | None, typer.Option(help="Only to this endpoint.", autocompletion=complete_endpoints)
    ] = None,
    job: Annotated[str | None, typer.Option(help="Only of this job.", autocompletion=complete_jobs)] = None,
    batch: Annotated[str | None, typer.Option(help="Only of this batch.", autocompletion=complete_batches)] = None,
    status: Annotated[str | None, typer.Option(help="Only pending, delivered or failed ones.")] = None,
    after: Annotated[str | None, typer.Option(help="Start behind this delivery id.")] = None,
    limit: Limit = 20,
    json: Json = False,
    api_url: ApiUrl = None,
    api_key: ApiKey = None,
) -> None:
    """List deliveries, newest first."""
    given = {"webhook_endpoint_id": endpoint, "job_id": job, "batch_id": batch, "status": status, "after": after}
    with api_client(api_url, api_key) as client:
        page = client.page("/v1/webhook_deliveries", limit, given)
    print_page(page, ("ID", "STATUS", "TRIES", "ANSWER", "AGE", "EVENT", "OF", "TO"), _row, json=json)


@app.command()
def show(delivery_id: DeliveryId, json: Json = False, api_url: ApiUrl = None, api_key: ApiKey = None) -> None:
    """Show one delivery: its attempts, the last answer, when it is tried again."""
    with api_client(api_url, api_key) as client:
        found = client.request("GET", delivery_route(delivery_id))
    if json:
        print_json(found)
        return
    moments = {name: f"{age(found[name])} ago" for name in ("created_at", "ended_at", "last_attempt_at") if found[name]}
    print_facts((name, str(value)) for name, value in (found | moments).items() if value is not None)


@app.command()
def replay(delivery_id: DeliveryId, json: Json = False, api_url: ApiUrl = None, api_key: ApiKey = None) -> None:
    """Send it once more, now, under the same event id."""
    call_verb(f"{delivery_route(delivery_id)}/replay", json=json, api_url=api_url, api_key=api_key)


def delivery_route(delivery_id: str) -> str:
    """A delivery's route. Raises DeliveryNotFound for what can be no id."""
    return path_to("/v1/webhook_deliveries", delivery_id, DeliveryNotFound)


def _row(found: dict[str, Any]) -> tuple[str, ...]:
    answer = str(found["last_status_code"] or found["last_error"] or "-")
    about, where = found["job_id"] or found["batch_id"] or "-", found["url"] or found["webhook_endpoint_id"] or "-"
    tries, since = str(found["attempts"]), age(found["created_at"])
    return (found["id"], found["status"], tries, answer, since, found["event_type"], about, where)
