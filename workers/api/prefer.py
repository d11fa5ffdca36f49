"""Request headers that say how an answer is wanted: Prefer, Idempotency-Key, and the OpenAI SDK's retry count."""

from dataclasses import dataclass

from starlette.datastructures import Headers

from inferfleet.tasks.calls import check_idempotency_key
from inferfleet.tasks.errors import InvalidRequest

MAX_WAIT_SECONDS = 60


@dataclass(frozen=True)
class Prefer:
    """RFC 7240: `respond-async` = 202 at once; `wait=N` = 202 after N seconds. None = wait for the end."""

    wait_seconds: float | None = None


def read_prefer(headers: Headers) -> Prefer:
    """Unknown preferences are ignored, as the RFC asks. Raises InvalidRequest for a wait that is not 0 to 60."""
    wait: float | None = None
    for part in ",".join(headers.getlist("prefer")).split(","):
        name, _, value = part.partition(";")[0].strip().lower().partition("=")
        if name == "respond-async":
            wait = wait or 0.0
        elif name == "wait":
            wait = float(read_wait(value.strip().strip('"'), "Prefer"))
    return Prefer(wait)


def read_wait(value: str, param: str) -> int:
    """Whole seconds between 0 and MAX_WAIT_SECONDS."""
    if not (value.isascii() and value.isdecimal()) or len(value) > 3 or int(value) > MAX_WAIT_SECONDS:
        raise InvalidRequest(f"wait must be a whole number of seconds between 0 and {MAX_WAIT_SECONDS}", param=param)
    return int(value)


def read_idempotency_key(headers: Headers) -> str | None:
    """The caller's key, or None. Raises InvalidRequest if it is empty, too long or not printable ASCII."""
    keys = headers.getlist("idempotency-key")
    if not keys:
        return None
    if len(keys) > 1:
        raise InvalidRequest("give one Idempotency-Key, not several", param="Idempotency-Key")
    check_idempotency_key(keys[0], "Idempotency-Key")
    return keys[0]


def read_retry_count(headers: Headers) -> int | None:
    """How often the OpenAI SDK has sent this request before; None = another client."""
    value = headers.get("x-stainless-retry-count", "")
    return int(value) if value.isascii() and value.isdecimal() and len(value) < 6 else None
