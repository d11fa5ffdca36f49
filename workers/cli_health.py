"""`inferfleet health ROLE`: does this role live on this machine? For a container's health check and for supervisors."""

import socket
from enum import StrEnum
from typing import Annotated

import typer

from inferfleet.tasks.errors import Unavailable
from inferfleet.tasks.settings import load_settings
from inferfleet.workers.cli_http import SHORT, ApiClient
from inferfleet.workers.cli_options import open_ledger
from inferfleet.workers.cli_output import out


class Role(StrEnum):
    api = "api"
    worker = "worker"
    batches = "batches"
    webhooks = "webhooks"


class NotAlive(Unavailable):
    """No process of this role on this machine said lately that it lives."""

    code = "not_alive"


def health(role: Annotated[Role, typer.Argument(help="The role that should run on this machine.")]) -> None:
    """Exit status 0 if a process of ROLE on this machine lives, 1 if none does, 3 if nobody can tell.

    The API is asked itself; the others say every heartbeat_seconds in Redis that they live, and while Redis is away
    nobody can tell (3): starting them again would not help, they wait for it.
    """
    settings = load_settings()
    if role is Role.api:
        with ApiClient(settings.local_api_url, timeout=SHORT) as client:
            client.request("GET", "/health")
    else:
        ledger = open_ledger(settings)
        alive = ledger.workers() if role is Role.worker else ledger.roles(role.value)
        ledger.close()
        if socket.gethostname() not in {info.get("host") for info in alive.values()}:
            raise NotAlive(f"no {role.value} on {socket.gethostname()} said lately that it lives")
    out.print(f"{role.value} lives", markup=False)
