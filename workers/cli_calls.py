"""What commands do alike with one thing of the API: call a verb on it, delete it."""

from inferfleet.workers.cli_options import api_client
from inferfleet.workers.cli_output import out, print_json


def call_verb(route: str, *, json: bool, api_url: str | None, api_key: str | None) -> None:
    """POST to a route such as /v1/jobs/ID/cancel, and print how the thing stands then."""
    with api_client(api_url, api_key) as client:
        found = client.request("POST", route)
    print_json(found) if json else out.print(f"{found['id']} {found['status']}", markup=False)


def delete_one(route: str, *, json: bool, api_url: str | None, api_key: str | None) -> None:
    """DELETE a thing, and print that it is gone."""
    with api_client(api_url, api_key) as client:
        gone = client.request("DELETE", route)
    print_json(gone) if json else out.print(f"{gone['id']} deleted", markup=False)
