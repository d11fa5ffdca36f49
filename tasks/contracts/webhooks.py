"""The bodies of /v1/webhook_endpoints. What a job says of its webhook is one of the queue's options."""

from typing import Annotated, Literal

from pydantic import Field, field_validator

from inferfleet.tasks import names
from inferfleet.tasks.contracts.contract import NO_TWINS, Contract, is_a_url, named_once
from inferfleet.tasks.hook_url import MAX_URL_CHARS

Url = Annotated[str, Field(min_length=1, max_length=MAX_URL_CHARS)]
Name = Annotated[str, Field(min_length=1, max_length=128)]
EventTypes = Annotated[
    list[names.EventType], Field(min_length=1, max_length=len(names.WEBHOOK_EVENTS), json_schema_extra=NO_TWINS)
]


class EndpointUpdate(Contract):
    """A change of a webhook endpoint; what is absent stays."""

    name: Name | None = None
    url: Url | None = None
    event_types: EventTypes | None = None
    #: Deliver again to an endpoint that was disabled.
    status: Literal["enabled"] | None = None

    _url = field_validator("url")(is_a_url)
    _once = field_validator("event_types")(named_once)


class EndpointCreate(Contract):
    """A webhook endpoint of a tenant."""

    name: Name
    url: Url
    event_types: EventTypes

    _url = field_validator("url")(is_a_url)
    _once = field_validator("event_types")(named_once)


class SecretRotation(Contract):
    """How the secret is changed."""

    #: Sign with the old secret too for 24 hours, so that the receiver can change over. False = it is of no more use.
    keep_old_secret_active_for_24_hours: bool = True


class EndpointTest(Contract):
    """An event to try an endpoint with."""

    event_type: names.EventType
