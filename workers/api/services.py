"""What the routes of one API process share. Made once at the start, reached through `Use`."""

from dataclasses import dataclass
from typing import Annotated, cast

from fastapi import Depends, Request

from inferfleet.tasks.ledger import AsyncLedger
from inferfleet.tasks.settings import Settings
from inferfleet.tasks.stores import AsyncStore
from inferfleet.workers.api.door import Door
from inferfleet.workers.api.hub import Hub
from inferfleet.workers.api.telemetry import HttpMetrics


@dataclass(frozen=True)
class Services:
    settings: Settings
    ledger: AsyncLedger
    #: Where the pictures are.
    store: AsyncStore
    hub: Hub
    door: Door
    metrics: HttpMetrics
    #: False only where nobody but this machine can connect.
    keys_required: bool


def services(request: Request) -> Services:
    """The running application's services."""
    return cast(Services, request.app.state.services)


Use = Annotated[Services, Depends(services)]
