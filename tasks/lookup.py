"""What became of idempotency keys: a producer asks which of its jobs the ledger still holds, and submits the others
again.

A key is known for as long as its job is kept: until result_ttl_seconds after the job's end (a dead letter's has its own
time), or until the job is deleted. A failover to a replica that lagged loses the jobs of the last moments, and their
keys with them.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from inferfleet.tasks import names
from inferfleet.tasks.call import Call, text
from inferfleet.tasks.calls import check_idempotency_key, idempotency_digest
from inferfleet.tasks.errors import InvalidRequest

MAX_KEYS = 1000


@dataclass(frozen=True)
class Known:
    """The job that an idempotency key made."""

    job_id: str
    state: names.State


def lookup(tenant: str, keys: Collection[str]) -> Call[dict[str, Known | None]]:
    """For each of 1 to 1000 idempotency keys the tenant's job, or None where the ledger holds none (any more)."""
    if isinstance(keys, str) or not 1 <= len(keys) <= MAX_KEYS:
        raise InvalidRequest(f"idempotency_keys must be a list of 1 to {MAX_KEYS} keys", param="idempotency_keys")
    for number, key in enumerate(keys):
        check_idempotency_key(key, f"idempotency_keys.{number}")

    def parse(answer: list[list[bytes]]) -> dict[str, Known | None]:
        return {key: known(found) for key, found in zip(keys, answer, strict=True)}

    return Call("lookup", (tenant, *(idempotency_digest(tenant, key) for key in keys)), parse)


def known(found: list[Any]) -> Known | None:
    if not found:
        return None
    state: Any = text(found[1])
    return Known(text(found[0]), state)
