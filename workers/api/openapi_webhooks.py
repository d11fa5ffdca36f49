"""The OpenAPI document's words about webhooks."""

from pydantic import BaseModel

from inferfleet.tasks.contracts import EndpointCreate, EndpointTest, EndpointUpdate, SecretRotation
from inferfleet.workers.api.openapi import BODY_ERRORS, answer, answers, body


class WebhookEndpoint(BaseModel):
    """OpenAI's `webhook_endpoint`; `signing_secret` only where it is made."""

    id: str
    object: str
    name: str
    url: str
    event_types: list[str]
    created_at: int
    updated_at: int
    signing_secret_hint: str
    signing_secret: str | None = None
    #: enabled or disabled
    status: str
    #: gone (it answered 410) or failing (for five days)
    disabled_reason: str | None
    failures: int
    failing_since: int | None


class WebhookEndpointList(BaseModel):
    object: str
    data: list[WebhookEndpoint]
    first_id: str | None
    last_id: str | None
    has_more: bool


class WebhookTestResult(BaseModel):
    """What the receiver answered."""

    object: str
    webhook_endpoint_id: str
    event_type: str
    status_code: int
    success: bool


class WebhookEventTypes(BaseModel):
    object: str
    data: list[str]


class WebhookDelivery(BaseModel):
    """One event on its way to one receiver; the header `webhook-id` of every attempt is `event_id`."""

    id: str
    object: str
    event_id: str
    event_type: str
    #: The job or the batch that it tells of; a test has neither.
    job_id: str | None
    batch_id: str | None
    #: None = a URL that the job brought along.
    webhook_endpoint_id: str | None
    url: str | None
    #: pending, delivered or failed
    status: str
    attempts: int
    created_at: int
    ended_at: int | None
    next_attempt_at: int | None
    last_attempt_at: int | None
    last_status_code: int | None
    last_error: str | None
    last_answer: str | None


class WebhookDeliveryList(BaseModel):
    object: str
    data: list[WebhookDelivery]
    first_id: str | None
    last_id: str | None
    has_more: bool


MODELS: tuple[type[BaseModel], ...] = (
    EndpointCreate, EndpointUpdate, SecretRotation, EndpointTest, WebhookEndpoint, WebhookEndpointList,
    WebhookTestResult, WebhookEventTypes, WebhookDelivery, WebhookDeliveryList,
)  # fmt: skip

_ENDPOINT = {"200": answer("the endpoint", WebhookEndpoint)}
CREATE = body(EndpointCreate) | answers(
    {"200": answer("the endpoint with its signing secret", WebhookEndpoint)}, *BODY_ERRORS, 409
)
LIST = answers({"200": answer("one page", WebhookEndpointList)}, 404, 422)
GET = answers(_ENDPOINT, 404)
UPDATE = body(EndpointUpdate) | answers(_ENDPOINT, *BODY_ERRORS, 404)
DELETE = answers({"200": {"description": "gone"}}, 404)
ROTATE = body(SecretRotation) | answers(
    {"200": answer("the endpoint with its new signing secret", WebhookEndpoint)}, *BODY_ERRORS, 404
)
TEST = body(EndpointTest) | answers(
    {"200": answer("what the receiver answered", WebhookTestResult)}, *BODY_ERRORS, 404, 502
)
EVENT_TYPES = answers({"200": answer("the event types", WebhookEventTypes)})
LIST_DELIVERIES = answers({"200": answer("one page", WebhookDeliveryList)}, 404, 422)
GET_DELIVERY = answers({"200": answer("the delivery", WebhookDelivery)}, 404)
REPLAY = answers({"202": answer("the delivery, due now", WebhookDelivery)}, 404, 409)
