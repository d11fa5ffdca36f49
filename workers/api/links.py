"""The urls of pictures: what they begin with, until when they work, and that they are signed (see signing.py)."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fastapi import Request

from inferfleet.tasks import roster
from inferfleet.tasks.errors import InvalidRequest
from inferfleet.tasks.records import JobRecord
from inferfleet.workers.api.services import Services
from inferfleet.workers.url_signing import signed_url

#: A name or an address, and a port. Whatever else a Host header says does not belong into a url.
HOST = re.compile(r"[A-Za-z0-9._~\-]{1,253}(:[0-9]{1,5})?|\[[0-9A-Fa-f:.]{2,45}\](:[0-9]{1,5})?", re.ASCII)

#: Id of a picture -> its url, and the Unix second until which that works.
Link = Callable[[str], tuple[str, int]]


@dataclass(frozen=True)
class Links:
    """Makes the urls of one answer."""

    base: str
    secret: bytes
    ttl_seconds: float

    def of(self, record: JobRecord) -> Link:
        """Of one job's pictures: they work as long as it is kept, and are the same whenever they are asked for."""
        until = int((record.finished_ms or 0) / 1000 + self.ttl_seconds)
        return lambda output_id: (signed_url(self.base, output_id, until, self.secret), until)


async def links_for(request: Request, use: Services, records: Sequence[JobRecord]) -> Links:
    """Asks for the secret only if one of the records has pictures. Raises InvalidRequest for an odd Host."""
    if not any(record.outputs for record in records):
        return Links("", b"", 0)
    secret = await use.ledger.run(roster.signing_secret())
    return Links(base_url(request, use.settings.public_url), secret, use.settings.result_ttl_seconds)


def base_url(request: Request, public_url: str | None) -> str:
    """Scheme and host as the client reaches this API: public_url, else what it asked for itself.

    X-Forwarded-Proto counts where uvicorn trusts it, from a proxy on this machine; X-Forwarded-Host never does.
    """
    if public_url is not None:
        return public_url.rstrip("/")
    host = request.headers.get("host") or request.url.netloc
    if not HOST.fullmatch(host):
        raise InvalidRequest("the Host header is no name or address with a port", param="Host")
    return f"{request.url.scheme}://{host}"
