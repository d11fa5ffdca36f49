"""Accepts a job once, however often its request arrives: by Idempotency-Key, or by what the OpenAI SDK gives away.

The SDK repeats a POST after a lost answer without any key, but counts its tries in a header. The id of a first try is
remembered before it is submitted, so a repeat submits the same id again, which the ledger takes as the same job.
"""

import hashlib

from starlette.datastructures import Headers

from inferfleet.tasks import names
from inferfleet.tasks.contracts import JobRequest
from inferfleet.tasks.errors import JobNotFound
from inferfleet.tasks.ledger import as_unavailable
from inferfleet.tasks.records import Submitted
from inferfleet.workers.api.door import Sealed, sealed
from inferfleet.workers.api.prefer import read_idempotency_key, read_retry_count
from inferfleet.workers.api.services import Services

SDK_MEMORY_SECONDS = 600


async def accept(use: Services, headers: Headers, job: JobRequest, tenant: str) -> Submitted:
    """Submits the job that a POST asks for, or finds the one that an earlier try of the same request made."""
    key = read_idempotency_key(headers)
    tries = read_retry_count(headers)
    accepted = await sealed(job)
    if key is not None or tries is None:
        return await use.door.submit(accepted, tenant, idempotency_key=key)
    job_id = await _sdk_job_id(use, accepted, tenant, again=tries > 0)
    return await use.door.submit(accepted, tenant, job_id=job_id)


async def _sdk_job_id(use: Services, job: Sealed, tenant: str, *, again: bool) -> str:
    digest = hashlib.sha256(f"{len(tenant)}:{tenant}:{job.hash}".encode()).hexdigest()
    memory = f"{use.ledger.prefix}sdk:{digest}"
    if again:
        with as_unavailable():
            known = await use.ledger.redis.get(memory)
        if isinstance(known, bytes) and await _worth_joining(use, known.decode(), tenant):
            return known.decode()
    job_id = names.new_job_id()
    with as_unavailable():
        await use.ledger.redis.set(memory, job_id, ex=SDK_MEMORY_SECONDS)
    return job_id


async def _worth_joining(use: Services, job_id: str, tenant: str) -> bool:
    """A first try that was cancelled because its client left must not be the answer to the second."""
    try:
        record = await use.ledger.get(job_id, tenant)
    except JobNotFound:
        return True  # remembered but never submitted: this try submits it under the same id
    return not record.terminal or record.state in ("completed", "incomplete")


def replay_headers(submitted: Submitted) -> dict[str, str]:
    """What every answer about an accepted job carries."""
    headers = {"x-job-id": submitted.job_id}
    return headers | {"idempotency-replayed": "true"} if submitted.replayed else headers
