"""`inferfleet endpoints`: where webhooks go: create, list, show, update, delete, rotate, test."""

from typing import Annotated, Any

import typer

from inferfleet.tasks.errors import EndpointNotFound
from inferfleet.tasks.names import WEBHOOK_ENDS, WEBHOOK_EVENTS
from inferfleet.workers.cli_calls import delete_one
from inferfleet.workers.cli_http import path_to
from inferfleet.workers.cli_options import ApiKey, ApiUrl, Json, Limit, api_client, complete_endpoints
from inferfleet.workers.cli_output import age, err, out, print_facts, print_json, print_page

app = typer.Typer(no_args_is_help=True, help="Where webhooks go. Who sends them is `inferfleet webhooks`.")

#: What a new endpoint is told: every end of a job, of a response and of a batch.
ENDS = [event for event in WEBHOOK_EVENTS if event.partition(".")[2] in WEBHOOK_ENDS]


def complete_events(incomplete: str) -> list[str]:
    """Event types, for the shell."""
    return [event for event in WEBHOOK_EVENTS if event.startswith(incomplete)]


EndpointId = Annotated[
    str, typer.Argument(metavar="ID", help="An endpoint's id (we_…).", autocompletion=complete_endpoints)
]
Events = Annotated[
    list[str] | None,
    typer.Option("--event", metavar="TYPE", help="Such as job.failed; repeatable.", autocompletion=complete_events),
]


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="What it is for; shown in the list.")],
    url: Annotated[str, typer.Argument(help="Where to: an https URL.")],
    event: Events = None,
    json: Json = False,
    api_url: ApiUrl = None,
    api_key: ApiKey = None,
) -> None:
    """Make an endpoint, told of every end unless --event says of what else. Its secret is shown this once."""
    body = {"name": name, "url": url, "event_types": event or ENDS}
    with api_client(api_url, api_key) as client:
        made = client.request("POST", "/v1/webhook_endpoints", body=body)
    _print_secret(made, json=json)


@app.command("list")
def list_endpoints(
    after: Annotated[str | None, typer.Option(help="Start behind this endpoint id.")] = None,
    limit: Limit = 20,
    json: Json = False,
    api_url: ApiUrl = None,
    api_key: ApiKey = None,
) -> None:
    """List endpoints, newest first."""
    with api_client(api_url, api_key) as client:
        page = client.page("/v1/webhook_endpoints", limit, {"after": after})
    print_page(
        page,
        ("ID", "STATUS", "FAILURES", "AGE", "NAME", "URL"),
        lambda e: (e["id"], e["status"], str(e["failures"]), age(e["created_at"]), e["name"], e["url"]),
        json=json,
    )


@app.command()
def show(endpoint_id: EndpointId, json: Json = False, api_url: ApiUrl = None, api_key: ApiKey = None) -> None:
    """Show one endpoint and its health."""
    with api_client(api_url, api_key) as client:
        _print_endpoint(client.request("GET", endpoint_route(endpoint_id)), json=json)


@app.command()
def update(
    endpoint_id: EndpointId,
    name: Annotated[str | None, typer.Option(help="Another name.")] = None,
    url: Annotated[str | None, typer.Option(help="Another URL; what waited goes there.")] = None,
    event: Events = None,
    enable: Annotated[bool, typer.Option("--enable", help="Deliver again to one that was disabled.")] = False,
    json: Json = False,
    api_url: ApiUrl = None,
    api_key: ApiKey = None,
) -> None:
    """Change an endpoint; what is not given stays."""
    change = {"name": name, "url": url, "event_types": event or None, "status": "enabled" if enable else None}
    change = {key: value for key, value in change.items() if value is not None}
    if not change:
        raise typer.BadParameter("give what is to change: --name, --url, --event or --enable")
    with api_client(api_url, api_key) as client:
        _print_endpoint(client.request("POST", endpoint_route(endpoint_id), body=change), json=json)


@app.command()
def delete(endpoint_id: EndpointId, json: Json = False, api_url: ApiUrl = None, api_key: ApiKey = None) -> None:
    """Forget an endpoint; deliveries that wait for it fail."""
    delete_one(endpoint_route(endpoint_id), json=json, api_url=api_url, api_key=api_key)


@app.command()
def rotate(
    endpoint_id: Annotated[
        str,
        typer.Argument(
            metavar="ID",
            help="An endpoint's id, or `default`: for URLs that jobs name.",
            autocompletion=complete_endpoints,
        ),
    ],
    drop_old: Annotated[bool, typer.Option("--drop-old", help="Else the old secret signs too for 24 hours.")] = False,
    json: Json = False,
    api_url: ApiUrl = None,
    api_key: ApiKey = None,
) -> None:
    """Make a new signing secret. It is shown this once."""
    body = {"keep_old_secret_active_for_24_hours": not drop_old}
    with api_client(api_url, api_key) as client:
        made = client.request("POST", f"{endpoint_route(endpoint_id)}/rotate_secret", body=body)
    _print_secret(made, json=json)


@app.command()
def test(
    endpoint_id: EndpointId,
    event: Annotated[
        str, typer.Option("--event", metavar="TYPE", help="Which event is made up.", autocompletion=complete_events)
    ] = ENDS[0],
    json: Json = False,
    api_url: ApiUrl = None,
    api_key: ApiKey = None,
) -> None:
    """Send a made-up event now, once, and say what the receiver answered."""
    with api_client(api_url, api_key) as client:
        found = client.request("POST", f"{endpoint_route(endpoint_id)}/test", body={"event_type": event})
    print_json(found) if json else out.print(f"the receiver answered {found['status_code']}")


def endpoint_route(endpoint_id: str) -> str:
    """An endpoint's route. Raises EndpointNotFound for what can be no id."""
    return path_to("/v1/webhook_endpoints", endpoint_id, EndpointNotFound)


def _print_secret(made: dict[str, Any], *, json: bool) -> None:
    if json:
        print_json(made)
        return
    print_facts([("id", made["id"]), ("signing secret", made["signing_secret"])])
    err.print("[dim]the secret is in no later answer: note it now[/]")


def _print_endpoint(endpoint: dict[str, Any], *, json: bool) -> None:
    if json:
        print_json(endpoint)
        return
    facts = [(name, str(endpoint[name])) for name in ("id", "name", "url", "status")]
    if reason := endpoint["disabled_reason"]:
        facts.append(("disabled by", reason))
    facts += [("events", ", ".join(endpoint["event_types"])), ("secret", endpoint["signing_secret_hint"])]
    facts += [("created", f"{age(endpoint['created_at'])} ago"), ("failures", str(endpoint["failures"]))]
    print_facts(facts)
