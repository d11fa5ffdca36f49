"""Every error that a user can meet, drawn as one tree. Knows codes and HTTP numbers, not HTTP itself.

    FleetError
    ├── RequestError                     the caller has to change something
    │   ├── InvalidHTTP                  400 invalid_http
    │   ├── InvalidJSON                  400 invalid_json
    │   ├── InvalidRequest               422 invalid_request
    │   │   ├── ContextLengthExceeded    422 context_length_exceeded
    │   │   ├── UrlNotAllowed            422 url_not_allowed
    │   │   └── UnsupportedFeature       422 unsupported_feature
    │   ├── Unauthorized                 401 unauthorized
    │   ├── Forbidden                    403 forbidden
    │   │   ├── InvalidSignature         403 invalid_signature
    │   │   └── UrlExpired               403 url_expired
    │   ├── MethodNotAllowed             405 method_not_allowed
    │   ├── RequestTimeout               408 request_timeout
    │   ├── BodyTooLarge                 413 body_too_large
    │   ├── UnsupportedMediaType         415 unsupported_media_type
    │   └── HeadersTooLarge              431 headers_too_large
    ├── NotFound
    │   ├── ModelNotFound                404 model_not_found
    │   ├── JobNotFound                  404 job_not_found
    │   ├── EndpointNotFound             404 webhook_endpoint_not_found
    │   ├── DeliveryNotFound             404 webhook_delivery_not_found
    │   ├── BatchNotFound                404 batch_not_found
    │   ├── FileNotFound                 404 file_not_found
    │   ├── ResponseNotFound             404 response_not_found
    │   └── OutputNotFound               404 output_not_found
    ├── OutputDamaged                    500 output_damaged
    ├── ObjectChanged                    500 object_changed
    ├── Conflict                         the job's state forbids it
    │   ├── IdempotencyKeyReuse          409 idempotency_key_reuse
    │   ├── BatchState                   409 batch_state
    │   ├── FileInUse                    409 file_in_use
    │   ├── AlreadyTerminal              409 already_terminal
    │   ├── NotTerminal                  409 not_terminal
    │   ├── NotQueued                    409 not_queued
    │   ├── EndpointDisabled             409 webhook_endpoint_disabled
    │   └── TooManyEndpoints             409 too_many_webhook_endpoints
    ├── Unavailable                      the same call may succeed later
    │   ├── QueueFull                    429 queue_full
    │   ├── LedgerUnavailable            503 ledger_unavailable
    │   ├── NoWebhookWorker              503 no_webhook_worker
    │   └── StoreUnavailable             503 store_unavailable
    │       └── StoreMisconfigured       503 store_misconfigured
    ├── ReceiverFailed                   502 webhook_receiver_failed
    ├── SetupError                       stops a start
    │   ├── RedisMisconfigured           500 redis_misconfigured
    │   └── SettingsError                500 settings_error
    └── JobFailed                        why a job ended without an answer
        ├── DeadlineExceeded             504 deadline_exceeded
        ├── StartTimeout                 504 start_timeout
        ├── ExecutionTimeout             504 execution_timeout
        ├── JobCancelled                 409 cancelled
        ├── WorkerLost                   500 worker_lost
        ├── LoadFailed                   503 load_failed
        ├── EngineError                  500 engine_error
        ├── OutOfMemory                  500 out_of_memory
        ├── NumericalError               500 nan_logits
        ├── EventLogFull                 500 event_log_full
        └── ResultTooLarge               500 result_too_large

A class's docstring is its message where none is given.
"""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar


class FleetError(Exception):
    """Something went wrong."""

    code: ClassVar[str] = "server_error"
    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"

    def __init__(
        self, message: str | None = None, *, param: str | None = None, retry_after: float | None = None
    ) -> None:
        self.message = message or (self.__doc__ or "").strip()
        self.param = param
        self.retry_after = retry_after
        super().__init__(self.message)

    def to_dict(self) -> dict[str, Any]:
        """The inside of OpenAI's `{"error": {...}}`: message, type, param, code."""
        return {"message": self.message, "type": self.type, "param": self.param, "code": self.code}


class RequestError(FleetError):
    """The request cannot be accepted as it is."""

    status = 400
    type = "invalid_request_error"


class InvalidHTTP(RequestError):
    """What was sent is not an HTTP/1.1 request."""

    code = "invalid_http"


class InvalidJSON(RequestError):
    """The body is not valid JSON."""

    code = "invalid_json"


class InvalidRequest(RequestError):
    """A field of the request is missing, unknown or out of its limits."""

    code = "invalid_request"
    status = 422


class ContextLengthExceeded(InvalidRequest):
    """The prompt and the tokens asked for do not fit the model's context."""

    code = "context_length_exceeded"


class UrlNotAllowed(InvalidRequest):
    """This URL may not be used here."""

    code = "url_not_allowed"


class UnsupportedFeature(InvalidRequest):
    """This field is part of the OpenAI API, but this fleet does not serve it."""

    code = "unsupported_feature"


class Unauthorized(RequestError):
    """The API key is missing or unknown."""

    code = "unauthorized"
    status = 401
    type = "authentication_error"


class Forbidden(RequestError):
    """This is not for the caller."""

    code = "forbidden"
    status = 403


class InvalidSignature(Forbidden):
    """The url's signature does not fit it."""

    code = "invalid_signature"


class UrlExpired(Forbidden):
    """The url has expired."""

    code = "url_expired"


class MethodNotAllowed(RequestError):
    """The route does not know this method."""

    code = "method_not_allowed"
    status = 405


class RequestTimeout(RequestError):
    """The request came too slowly."""

    code = "request_timeout"
    status = 408


class BodyTooLarge(RequestError):
    """The body is larger than this server accepts."""

    code = "body_too_large"
    status = 413


class UnsupportedMediaType(RequestError):
    """The body must be application/json."""

    code = "unsupported_media_type"
    status = 415


class HeadersTooLarge(RequestError):
    """The request's first line and headers are larger than this server accepts."""

    code = "headers_too_large"
    status = 431


class NotFound(FleetError):
    """There is no such thing."""

    code = "not_found"
    status = 404
    type = "invalid_request_error"


class ModelNotFound(NotFound):
    """No worker serves this model and no setting names it."""

    code = "model_not_found"


class JobNotFound(NotFound):
    """There is no job with this id."""

    code = "job_not_found"


class BatchNotFound(NotFound):
    """There is no batch with this id."""

    code = "batch_not_found"


class FileNotFound(NotFound):
    """There is no file with this id."""

    code = "file_not_found"


class ResponseNotFound(NotFound):
    """There is no response with this id."""

    code = "response_not_found"


class OutputNotFound(NotFound):
    """There is no file with this id, or it was deleted with its job."""

    code = "output_not_found"


class OutputDamaged(FleetError):
    """The stored file is not what was written."""

    code = "output_damaged"


class ObjectChanged(FleetError):
    """The object in the bucket was exchanged while it was read."""

    code = "object_changed"


class EndpointNotFound(NotFound):
    """There is no webhook endpoint with this id."""

    code = "webhook_endpoint_not_found"


class DeliveryNotFound(NotFound):
    """There is no webhook delivery with this id."""

    code = "webhook_delivery_not_found"


class Conflict(FleetError):
    """The state of the job does not allow this."""

    code = "conflict"
    status = 409
    type = "conflict_error"


class IdempotencyKeyReuse(Conflict):
    """This idempotency key or job id was already used with another body."""

    code = "idempotency_key_reuse"


class BatchState(Conflict):
    """The status of the batch does not allow this."""

    code = "batch_state"


class FileInUse(Conflict):
    """A batch that has not ended reads this file."""

    code = "file_in_use"


class AlreadyTerminal(Conflict):
    """The job has already ended."""

    code = "already_terminal"


class NotTerminal(Conflict):
    """The job has not ended yet."""

    code = "not_terminal"


class NotQueued(Conflict):
    """Only a job that still waits can be changed."""

    code = "not_queued"


class EndpointDisabled(Conflict):
    """The webhook endpoint is disabled; enable it first."""

    code = "webhook_endpoint_disabled"


class TooManyEndpoints(Conflict):
    """The tenant has as many webhook endpoints as it may have."""

    code = "too_many_webhook_endpoints"


class Unavailable(FleetError):
    """The fleet cannot do this now."""

    status = 503


class QueueFull(Unavailable):
    """Too many jobs wait for this model."""

    code = "queue_full"
    status = 429
    type = "rate_limit_error"


class LedgerUnavailable(Unavailable):
    """The ledger (Redis) cannot be reached or refuses to write."""

    code = "ledger_unavailable"


class NoWebhookWorker(Unavailable):
    """No worker sent the event in time: `inferfleet webhooks` has to run."""

    code = "no_webhook_worker"


class ReceiverFailed(FleetError):
    """The webhook's receiver could not be reached or gave no answer."""

    code = "webhook_receiver_failed"
    status = 502


class StoreUnavailable(Unavailable):
    """The store of files cannot be reached or cannot write."""

    code = "store_unavailable"


class StoreMisconfigured(StoreUnavailable):
    """The store of files refuses this fleet: its bucket or access keys have to be mended first."""

    code = "store_misconfigured"


class SetupError(FleetError):
    """The settings or the services around the fleet are not usable."""

    code = "setup_error"


class RedisMisconfigured(SetupError):
    """This Redis server is set up in a way that would lose jobs."""

    code = "redis_misconfigured"


class SettingsError(SetupError):
    """A setting is unknown or has a bad value."""

    code = "settings_error"


class JobFailed(FleetError):
    """The job failed."""

    code = "job_failed"


class DeadlineExceeded(JobFailed):
    """The job's deadline passed before it was done."""

    code = "deadline_exceeded"
    status = 504


class StartTimeout(JobFailed):
    """The job did not start within its start_timeout."""

    code = "start_timeout"
    status = 504


class ExecutionTimeout(JobFailed):
    """The job ran longer than its execution_timeout."""

    code = "execution_timeout"
    status = 504


class JobCancelled(JobFailed):
    """The job was cancelled."""

    code = "cancelled"
    status = 409


class WorkerLost(JobFailed):
    """Every worker that took this job was lost while running it."""

    code = "worker_lost"


class LoadFailed(JobFailed):
    """The model cannot be loaded as the worker's settings have it."""

    code = "load_failed"
    status = 503


class EngineError(JobFailed):
    """The engine failed while running the job."""

    code = "engine_error"


class OutOfMemory(JobFailed):
    """The engine ran out of memory on this job."""

    code = "out_of_memory"


class NumericalError(JobFailed):
    """The model gave numbers that are not finite for this job."""

    code = "nan_logits"


class EventLogFull(JobFailed):
    """The job published more events than one job's log may hold."""

    code = "event_log_full"


class ResultTooLarge(JobFailed):
    """The files that the job made are larger than one job may keep."""

    code = "result_too_large"


def error_classes(root: type[FleetError] = FleetError) -> Iterator[type[FleetError]]:
    """The classes of the tree, root first."""
    yield root
    for child in root.__subclasses__():
        yield from error_classes(child)


BY_CODE: dict[str, type[FleetError]] = {
    cls.code: cls for cls in reversed([cls for cls in error_classes() if "code" in vars(cls)])
}


def from_dict(data: Mapping[str, Any]) -> FleetError:
    """The error that `to_dict` described. A code of a newer version becomes the base class, message kept."""
    cls = BY_CODE.get(str(data.get("code")), FleetError)
    return cls(data.get("message"), param=data.get("param"))
