"""What every contract shares: strictness, the queue's options, and how a complaint becomes a typed error.

Every number has a least and a greatest value and every list a length; an unknown field is refused by name. A request
that exists is a valid one, so the worker and the engine need not ask again.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic.config import JsonDict
from pydantic_core import PydanticCustomError

from inferfleet.tasks import names, strict_json
from inferfleet.tasks.contracts.complaints import worded
from inferfleet.tasks.errors import InvalidRequest, UnsupportedFeature
from inferfleet.tasks.hook_url import MAX_URL_CHARS, BadUrl, parse_url

MAX_MODEL_NAME = 256
MAX_SEED = 2**63 - 1
MAX_METADATA = 16
#: Year 2100, so that a deadline in milliseconds by mistake is refused.
MAX_UNIX_SECONDS = 4_102_444_800
MAX_TIMEOUT_SECONDS = 7 * 86400
ENDPOINT_ID = re.compile(r"we_[0-9a-f]{32}")
#: service_tier -> priority, where the request gives none. Lower runs first.
TIERS: dict[str | None, int] = {"priority": -50, "default": 0, "auto": 0, "flex": 50, None: 0}

ModelName = Annotated[str, Field(min_length=1, max_length=MAX_MODEL_NAME)]
UnixSeconds = Annotated[float, Field(ge=0, le=MAX_UNIX_SECONDS)]
#: Lower runs first.
Priority = Annotated[int, Field(ge=-100, le=100, description="lower runs first")]
Timeout = Annotated[float, Field(gt=0, le=MAX_TIMEOUT_SECONDS)]
Tier = Literal["auto", "default", "flex", "priority"]
#: For the document: `named_once` refuses them.
NO_TWINS: JsonDict = {"uniqueItems": True}
WebhookWords = Annotated[
    list[names.WebhookWord], Field(min_length=1, max_length=len(names.WEBHOOK_WORDS), json_schema_extra=NO_TWINS)
]
User = Annotated[str, Field(max_length=512)]
#: Taken for the sake of clients that send it.
Ignored = Annotated[str, Field(max_length=512)]
Metadata = Annotated[
    dict[Annotated[str, Field(min_length=1, max_length=64)], Annotated[str, Field(max_length=512)]],
    Field(max_length=MAX_METADATA),
]


class Contract(BaseModel):
    """Strict: no text for a number, no true for 1, no field that is not written here."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True, hide_input_in_errors=True)


C = TypeVar("C", bound=Contract)


def is_a_webhook(webhook: str | None) -> str | None:
    """A URL's form, or the id of an endpoint. Which addresses are allowed is for the settings to say, later."""
    if webhook is not None and not ENDPOINT_ID.fullmatch(webhook):
        is_a_url(webhook)
    return webhook


def is_a_url(url: str | None) -> str | None:
    try:
        parse_url(url or "")
    except BadUrl as error:
        raise refused(str(error)) from None
    return url


def named_once(values: Sequence[str] | None) -> Sequence[str] | None:
    if values is not None and len(set(values)) < len(values):
        raise refused("the list names one event twice")
    return values


class QueueOptions(Contract):
    """How a job waits. Lower priority runs first; without one the service_tier gives it."""

    priority: Priority | None = None
    service_tier: Tier | None = None
    #: Unix seconds; a job that is not done by then expires.
    deadline: UnixSeconds | None = None
    metadata: Metadata | None = None
    #: An https URL, or the id of a webhook endpoint, that is told what becomes of the job.
    webhook: Annotated[str, Field(min_length=1, max_length=MAX_URL_CHARS)] | None = None
    #: What of it is told; None = its end, whichever it is.
    webhook_events_filter: WebhookWords | None = None

    _webhook = field_validator("webhook")(is_a_webhook)
    _words_once = field_validator("webhook_events_filter")(named_once)


def validated(contract: type[C], values: Any) -> C:
    """JSON values -> contract, with the first complaint as a typed error."""
    try:
        return contract.model_validate(values)
    except ValidationError as error:
        raise described(error) from None


def served(body: Any, unserved: Mapping[str, tuple[tuple[Any, ...], str]]) -> Any:
    """A body without the fields that nothing here answers to.

    unserved: field -> values that change nothing, and what to use instead of any other; that raises a complaint.
    """
    if not isinstance(body, dict):
        return body
    for name, (harmless, instead) in unserved.items():
        value = body.get(name)
        if value is not None and not any(type(value) is type(same) and value == same for same in harmless):
            raise unsupported(f"{name} is not served: {instead}", name)
    # A null is the SDK's way of saying "not given".
    return {name: value for name, value in body.items() if name not in unserved}


def refused(message: str, field: str | None = None) -> PydanticCustomError:
    return PydanticCustomError("refused", "{message}", {"message": message, "field": field})


def unsupported(message: str, field: str | None = None) -> PydanticCustomError:
    return PydanticCustomError("unsupported", "{message}", {"message": message, "field": field})


def described(error: ValidationError) -> InvalidRequest:
    first = error.errors(include_url=False, include_input=False)[0]
    field = first.get("ctx", {}).get("field")
    path = [part for part in first["loc"] if not str(part).startswith("<")] + ([field] if field else [])
    param = strict_json.dotted(tuple(part for part in path if part != "[key]"))
    if first["type"] == "extra_forbidden":
        return InvalidRequest(f"unknown field {param}", param=param)
    message = first["msg"] if first["type"] in ("refused", "unsupported") else worded(first, param or "the body")
    kind = UnsupportedFeature if first["type"] == "unsupported" else InvalidRequest
    return kind(message, param=param)
