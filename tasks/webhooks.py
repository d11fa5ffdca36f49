"""The ledger's questions about webhooks: endpoints, the deliveries in the outbox, and who sends them.

As in calls.py every call may be sent twice, and time is the Redis server's. A secret is read by `take_delivery` alone.
"""

import base64
import secrets
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from inferfleet.tasks.call import Call, Steps, integer, opt, text, to_json
from inferfleet.tasks.calls import ENTRIES_PER_SCAN, MAX_PAGE
from inferfleet.tasks.errors import (
    DeliveryNotFound,
    EndpointDisabled,
    EndpointNotFound,
    InvalidRequest,
    TooManyEndpoints,
)

#: Every end of a job asks each endpoint of its tenant.
MAX_ENDPOINTS = 20
SECRET_BYTES = 32
SECRET_PREFIX = "whsec_"
#: How long an old secret still signs beside the new one.
ROTATION_MS = 86_400_000
STATES = ("pending", "delivered", "failed")

ENDPOINT_FIELDS = ("name", "url", "events", "secret", "created_ms", "updated_ms")
DELIVERY_FIELDS = (
    "event", "type", "endpoint", "url", "subject", "state", "attempts", "created_ms", "ended_ms", "last_ms",
    "last_status", "last_error", "last_answer",
)  # fmt: skip


@dataclass(frozen=True)
class Endpoint:
    """Where a tenant wants events of some types. Times are Unix milliseconds."""

    id: str
    name: str
    url: str
    events: tuple[str, ...]
    #: The secret's last characters; the whole is shown when it is made, and never again.
    secret_hint: str
    created_ms: int
    updated_ms: int
    #: Why nothing is sent there: gone (it answered 410) or failing (for days); None = it is enabled.
    disabled: str | None
    #: Failed attempts since the last one that worked.
    failures: int
    failing_since_ms: int | None


@dataclass(frozen=True)
class Delivery:
    """One event on its way to one receiver."""

    id: str
    event: str
    type: str
    #: None = a URL that the job brought along.
    endpoint: str | None
    url: str | None
    #: The job or the batch.
    subject: str | None
    state: str
    attempts: int
    created_ms: int
    ended_ms: int | None
    last_ms: int | None
    last_status: int | None
    last_error: str | None
    #: The beginning of what the receiver answered.
    last_answer: str | None
    #: From when it may be sent; None = it has ended or is being sent.
    due_ms: int | None


@dataclass(frozen=True)
class Taken:
    """A delivery in the hands of a sender."""

    id: str
    #: Names this attempt in `record_delivery`; a higher one exists once its lease was over.
    fence: int
    event: str
    type: str
    body: bytes
    url: str
    tenant: str
    #: Attempts before this one.
    attempts: int
    #: Attempts that it is worth; None = as many as the schedule has.
    tries: int | None
    #: The newest first.
    secrets: tuple[str, ...]
    now_ms: int

    def __repr__(self) -> str:
        """Without secrets, URL and body, which must not get into a log."""
        return f"Taken({self.id}, fence={self.fence}, type={self.type})"


@dataclass(frozen=True)
class Verdict:
    """What follows from an attempt."""

    #: delivered | again | failed | gone
    outcome: str
    status: int | None = None
    error: str | None = None
    answer: str = ""
    #: Before the next attempt, with outcome again.
    delay_ms: int = 0
    #: The receiver asked that nothing come before.
    pause_ms: int = 0


@dataclass(frozen=True)
class Recorded:
    #: delivered | again | failed | parked | same | stale
    word: str
    #: Why the receiver was disabled by this very attempt.
    disabled: str | None


def new_secret() -> str:
    """A secret as Standard Webhooks writes it: `whsec_` and 32 random bytes in base64."""
    return SECRET_PREFIX + base64.b64encode(secrets.token_bytes(SECRET_BYTES)).decode()


def new_endpoint_id() -> str:
    return f"we_{uuid.uuid4().hex}"


# Endpoints -----------------------------------------------------------------------------------------------------------


def put_endpoint(endpoint_id: str, tenant: str, name: str, url: str, events: Sequence[str], secret: str) -> Call[None]:
    """Make an endpoint. Raises TooManyEndpoints."""

    def parse(answer: bytes) -> None:
        if answer == b"full":
            raise TooManyEndpoints(f"a tenant may have {MAX_ENDPOINTS} webhook endpoints; delete one first")

    return Call("put_endpoint", (endpoint_id, tenant, name, url, " ".join(events), secret, MAX_ENDPOINTS), parse)


def update_endpoint(
    endpoint_id: str,
    tenant: str,
    *,
    name: str | None = None,
    url: str | None = None,
    events: Sequence[str] | None = None,
    enable: bool = False,
) -> Call[None]:
    """Change an endpoint; None leaves a value as it is. `enable`, or another URL, lets deliveries flow again."""
    words = None if events is None else " ".join(events)
    args = (endpoint_id, tenant, opt(name), opt(url), opt(words), "1" if enable else "")
    return Call("update_endpoint", args, found_endpoint)


def found_endpoint(answer: bytes) -> None:
    if answer == b"missing":
        raise EndpointNotFound(param="webhook_endpoint_id")


def rotate_secret(endpoint_id: str | None, tenant: str, secret: str, keep_ms: int = ROTATION_MS) -> Call[None]:
    """Give an endpoint another secret; None = that of the URLs which the tenant's jobs bring along. The old one signs
    beside it for keep_ms."""
    return Call("rotate_secret", (opt(endpoint_id), tenant, secret, keep_ms), found_endpoint)


def delete_endpoint(endpoint_id: str, tenant: str) -> Call[None]:
    """Forget an endpoint; deliveries that wait for it fail."""
    return Call("delete_endpoint", (endpoint_id, tenant, uuid.uuid4().hex), found_endpoint)


def endpoints(tenant: str) -> Call[list[Endpoint]]:
    """A tenant's endpoints, newest first."""
    return Call("endpoints", (tenant, "", *ENDPOINT_FIELDS), read_endpoints)


def endpoint(endpoint_id: str, tenant: str) -> Call[Endpoint]:
    """One endpoint. Raises EndpointNotFound, for another tenant's too."""

    def parse(answer: list[Any]) -> Endpoint:
        if not answer:
            raise EndpointNotFound(param="webhook_endpoint_id")
        return read_endpoints(answer)[0]

    return Call("endpoints", (tenant, endpoint_id, *ENDPOINT_FIELDS), parse)


def read_endpoints(answer: list[Any]) -> list[Endpoint]:
    found = []
    for endpoint_id, values, (disabled, failures, since) in answer:
        name, url, events, secret, created, updated = (text(value) for value in values)
        found.append(
            Endpoint(
                id=text(endpoint_id),
                name=name,
                url=url,
                events=tuple(events.split()),
                secret_hint=f"{SECRET_PREFIX}…{secret[-5:]}",
                created_ms=int(created),
                updated_ms=int(updated),
                disabled=text(disabled) if disabled else None,
                failures=int(failures or 0),
                failing_since_ms=integer(since),
            )
        )
    return found


def test_endpoint(endpoint_id: str, tenant: str, event_type: str) -> Call[str]:
    """Put a made-up event into the outbox, for this endpoint alone, to be tried once. Answers the delivery's id."""
    whose, _, status = event_type.partition(".")
    prefix = {"job": "job", "response": "resp", "batch": "batch"}[whose]
    data = {"id": f"{prefix}_" + "0" * 32, "status": status, "seq": 0, "test": True}

    def parse(answer: bytes | None) -> str:
        if answer is None:
            raise EndpointNotFound(param="webhook_endpoint_id")
        return text(answer)

    return Call("test_delivery", (endpoint_id, tenant, event_type, uuid.uuid4().hex, to_json(data)), parse)


# Deliveries ----------------------------------------------------------------------------------------------------------


def get_delivery(delivery_id: str, tenant: str) -> Call[Delivery]:
    """One delivery. Raises DeliveryNotFound, for another tenant's too."""

    def parse(answer: list[Any] | None) -> Delivery:
        if answer is None:
            raise DeliveryNotFound(param="webhook_delivery_id")
        return read_delivery(answer)

    return Call("get_delivery", (delivery_id, tenant, *DELIVERY_FIELDS), parse)


def list_deliveries(
    tenant: str,
    endpoint_id: str | None = None,
    subject: str | None = None,
    state: str | None = None,
    after: str | None = None,
    limit: int = 20,
) -> Steps[tuple[list[Delivery], bool]]:
    """A tenant's deliveries, newest first, and whether there are more. `after` is the last id of the page before."""
    if not 1 <= limit <= MAX_PAGE:
        raise InvalidRequest(f"limit must lie between 1 and {MAX_PAGE}", param="limit")
    found: list[Delivery] = []
    cursor = ""
    while True:
        filters = (tenant, opt(endpoint_id), opt(subject), opt(state), opt(after), cursor)
        rest = (limit + 1 - len(found), ENTRIES_PER_SCAN, *DELIVERY_FIELDS)
        cursor, more = yield Call("list_deliveries", filters + rest, parse_deliveries)
        found += more
        if not cursor or len(found) > limit:
            return found[:limit], len(found) > limit


def parse_deliveries(answer: list[Any] | None) -> tuple[str, list[Delivery]]:
    if answer is None:
        raise DeliveryNotFound("after names no delivery of this tenant", param="after")
    return text(answer[0]), [read_delivery(entry) for entry in answer[1:]]


def read_delivery(entry: Sequence[Any]) -> Delivery:
    delivery_id, values, due = entry
    raw = dict(zip(DELIVERY_FIELDS, values, strict=True))
    words = ("event", "type", "endpoint", "url", "subject", "state", "last_error", "last_answer")
    data: dict[str, Any] = {
        name: (value.decode(errors="replace") if value else None) if name in words else integer(value)
        for name, value in raw.items()
    }
    return Delivery(id=text(delivery_id), due_ms=round(float(due)) if due else None, **data)


def replay_delivery(delivery_id: str, tenant: str) -> Call[None]:
    """Send it again now, with the same event id. Raises DeliveryNotFound, EndpointNotFound, EndpointDisabled."""

    def parse(answer: bytes) -> None:
        if answer == b"missing":
            raise DeliveryNotFound(param="webhook_delivery_id")
        if answer == b"deleted":
            raise EndpointNotFound("its endpoint was deleted", param="webhook_delivery_id")
        if answer == b"disabled":
            raise EndpointDisabled()

    return Call("replay_delivery", (delivery_id, tenant, uuid.uuid4().hex), parse)


# Sending -------------------------------------------------------------------------------------------------------------


def take_delivery(token: str, lease_ms: int) -> Call[Taken | None]:
    """The delivery that is due, or None. A token is good for one delivery, however often it is sent."""

    def parse(answer: list[Any]) -> Taken | None:
        if answer[0] == b"none":
            return None
        _, delivery_id, fence, event, kind, body, url, tenant, attempts, tries, secret, old, now = answer
        return Taken(
            id=text(delivery_id),
            fence=int(fence),
            event=text(event),
            type=text(kind),
            body=body,
            url=text(url),
            tenant=text(tenant),
            attempts=int(attempts),
            tries=integer(tries),
            secrets=tuple(text(each) for each in (secret, old) if each),
            now_ms=int(now),
        )

    return Call("take_delivery", (token, lease_ms, new_secret()), parse)


def record_delivery(taken: Taken, verdict: Verdict, keep_ms: int) -> Call[Recorded]:
    """Write down how an attempt went; the record of an ended delivery lives for keep_ms."""

    def parse(answer: list[bytes]) -> Recorded:
        return Recorded(text(answer[0]), text(answer[1]) or None)

    about = (taken.id, taken.fence, taken.event, verdict.outcome, opt(verdict.status), opt(verdict.error))
    rest = (verdict.answer, verdict.delay_ms, verdict.pause_ms, keep_ms)
    return Call("record_delivery", about + rest, parse)


def sweep_deliveries(limit: int = 100) -> Call[int]:
    """Forget old records; how many receivers have something to be sent now."""
    return Call("sweep_deliveries", (limit,), lambda answer: int(answer[1]))
