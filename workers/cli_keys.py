"""`inferfleet keys`: make, list and delete API keys. Speaks to the ledger: the first key opens the API."""

from typing import Annotated

import typer

from inferfleet.tasks.errors import NotFound
from inferfleet.tasks.settings import load_settings
from inferfleet.workers.cli_options import Json, open_ledger
from inferfleet.workers.cli_output import err, out, print_json, print_table
from inferfleet.workers.keys import KEY_PREFIX, digest, new_key

app = typer.Typer(no_args_is_help=True, help="API keys: each acts for one tenant.")

#: A digest's beginning is enough to name a key.
SHOWN = 12


class KeyNotFound(NotFound):
    """No API key has this id."""

    code = "key_not_found"


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="What it is for; shown in the list.")] = "",
    tenant: Annotated[str, typer.Option(help="Who it acts for; tenants do not see each other's jobs.")] = "default",
    json: Json = False,
) -> None:
    """Make a key. It is shown now and never again: only its SHA-256 is kept."""
    if not tenant or len(tenant) > 128 or not tenant.isprintable():
        raise typer.BadParameter("a tenant is 1 to 128 printable characters", param_hint="--tenant")
    key = new_key()
    ledger = open_ledger(load_settings())
    ledger.put_key(digest(key), tenant, name)
    ledger.close()
    if json:
        print_json({"id": digest(key)[:SHOWN], "key": key, "tenant": tenant, "name": name})
        return
    out.print(key, markup=False)
    err.print("[dim]kept only as a digest: note it now[/]")


@app.command("list")
def list_keys(json: Json = False) -> None:
    """List the keys by the beginning of their digests."""
    ledger = open_ledger(load_settings())
    keys = ledger.list_keys()
    ledger.close()
    rows = [(stored[:SHOWN], facts["tenant"], facts["name"]) for stored, facts in sorted(keys.items())]
    if json:
        print_json([dict(zip(("id", "tenant", "name"), row, strict=True)) for row in rows])
    else:
        print_table(("ID", "TENANT", "NAME"), rows)


@app.command()
def delete(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="A key's id from `keys list`, or the key itself.")],
    json: Json = False,
) -> None:
    """Refuse a key from now on."""
    wanted = digest(key_id) if key_id.startswith(KEY_PREFIX) else key_id
    ledger = open_ledger(load_settings())
    found = [stored for stored in ledger.list_keys() if stored.startswith(wanted)]
    if len(found) != 1 or len(wanted) < SHOWN:
        raise KeyNotFound(f"no API key has the id {key_id[:SHOWN]!r}")
    ledger.delete_key(found[0])
    ledger.close()
    print_json({"id": found[0][:SHOWN], "deleted": True}) if json else out.print(f"{found[0][:SHOWN]} deleted")
