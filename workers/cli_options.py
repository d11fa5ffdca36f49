"""Options that several commands share, and how a command finds the API and the ledger."""

import os
from pathlib import Path
from typing import Annotated

import typer

from inferfleet.tasks.errors import FleetError, InvalidRequest, ModelNotFound, SettingsError
from inferfleet.tasks.ledger import Ledger
from inferfleet.tasks.settings import ModelSpec, Settings, load_settings
from inferfleet.workers.cli_http import SHORT, ApiClient
from inferfleet.workers.up import running_fleet


def complete_models(incomplete: str) -> list[str]:
    """Names of served models, for the shell; nothing when the API does not answer quickly."""
    try:
        with api_client(None, None, quick=True) as client:
            models = client.request("GET", "/v1/models")["data"]
    except FleetError:
        return []
    return [model["id"] for model in models if model["id"].startswith(incomplete)]


def complete_jobs(incomplete: str) -> list[tuple[str, str]]:
    """Ids of the latest jobs with their states, for the shell."""
    return _latest("/v1/jobs", "status", incomplete)


def complete_batches(incomplete: str) -> list[tuple[str, str]]:
    """Ids of the latest batches with their states."""
    return _latest("/v1/batches", "status", incomplete)


def complete_files(incomplete: str) -> list[tuple[str, str]]:
    """Ids of the latest files with their names."""
    return _latest("/v1/files", "filename", incomplete)


def complete_endpoints(incomplete: str) -> list[tuple[str, str]]:
    """Ids of the webhook endpoints with their names."""
    return _latest("/v1/webhook_endpoints", "name", incomplete)


def _latest(collection: str, about: str, incomplete: str) -> list[tuple[str, str]]:
    try:
        with api_client(None, None, quick=True) as client:
            found = client.request("GET", collection, params={"limit": "50"})["data"]
    except FleetError:
        return []
    return [(each["id"], str(each[about])) for each in found if each["id"].startswith(incomplete)]


Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
ApiUrl = Annotated[
    str | None,
    typer.Option("--api-url", metavar="URL", help="Where the API is (INFERFLEET_API_URL).", rich_help_panel="API"),
]
ApiKey = Annotated[
    str | None,
    typer.Option("--api-key", metavar="KEY", help="A key of the API (INFERFLEET_API_KEY).", rich_help_panel="API"),
]
Limit = Annotated[int, typer.Option(min=1, max=100, help="How many at most.")]
Models = Annotated[
    list[str] | None,
    typer.Option("--model", "-m", metavar="NAME=PATH", help="Serve this model: a folder or a hub id; repeatable."),
]
DataDir = Annotated[
    Path | None, typer.Option("--data-dir", help="Where Redis data and logs are kept.", file_okay=False)
]


def api_client(url: str | None, key: str | None, *, quick: bool = False) -> ApiClient:
    """A client of the API named by flag or setting, else of the fleet that `inferfleet up` runs here, else of the
    default address."""
    settings = load_settings({"api_url": url, "api_key": key})
    address = settings.api_url or running_fleet(data_dir(settings)).get("api_url") or settings.local_api_url
    secret = None if settings.api_key is None else settings.api_key.get_secret_value()
    return ApiClient(address, secret, *([SHORT] if quick else []))


def open_ledger(settings: Settings) -> Ledger:
    """The ledger of redis_url if it was set, else of the fleet that `inferfleet up` runs here, else of the default."""
    running = {} if "redis_url" in settings.model_fields_set else running_fleet(data_dir(settings))
    return Ledger.from_url(running.get("redis_url", settings.redis_url), settings.namespace)


def data_dir(settings: Settings) -> Path:
    """Where `inferfleet up` keeps what must outlive it."""
    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return (settings.data_dir or Path(state) / "inferfleet").expanduser().absolute()


def named_models(values: list[str] | None) -> dict[str, ModelSpec] | None:
    """NAME=PATH flags as settings; None if there were none."""
    if not values:
        return None
    models: dict[str, ModelSpec] = {}
    for value in values:
        name, found, path = value.partition("=")
        if not (found and name and path):
            raise SettingsError(f"--model {value!r} is not NAME=PATH", param="models")
        local = Path(path).expanduser()
        models[name] = ModelSpec(path=str(local.absolute()) if local.exists() else path)
    return models


def key_values(pairs: list[str] | None) -> dict[str, str]:
    """KEY=VALUE flags of --metadata. Raises typer.BadParameter."""
    split = [pair.partition("=") for pair in pairs or ()]
    for pair, (_, found, _) in zip(pairs or (), split, strict=True):
        if not found:
            raise typer.BadParameter(f"{pair!r} is not KEY=VALUE", param_hint="--metadata")
    return {key: value for key, _, value in split}


def pick_model(client: ApiClient, wanted: str | None, *, kind: str) -> str:
    """The model that was asked for, or the only one of its kind ("text", "image") that there is."""
    if wanted is not None:
        return wanted
    cards = client.request("GET", "/v1/models")["data"]
    # The kind of a model that no worker has loaded yet may be unknown: it is a candidate only where none is sure.
    sure = [str(card["id"]) for card in cards if card.get("kind") == kind]
    found = sure or [str(card["id"]) for card in cards if card.get("kind") is None]
    if not found:
        others = ", ".join(f"{card['id']} ({card['kind']})" for card in cards)
        beside = f" beside {others}" if others else ""
        raise ModelNotFound(
            f"no {kind} model is served{beside}; start a worker with `inferfleet worker --model NAME=PATH`"
        )
    if len(found) > 1:
        listed = ", ".join(found)
        raise InvalidRequest(f"several {kind} models are served, choose one with --model: {listed}", param="model")
    return found[0]
