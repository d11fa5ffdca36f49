"""Who is calling: the tenant behind an API key. Where only this machine can connect, none is needed."""

from typing import Annotated

from fastapi import Depends, Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from inferfleet.tasks.errors import SetupError, Unauthorized
from inferfleet.workers.api.services import Services
from inferfleet.workers.keys import KEY_PREFIX, digest

DEFAULT_TENANT = "default"


class NoApiKey(SetupError):
    """The API would listen beyond this machine without a single API key."""

    code = "no_api_key"


bearer = HTTPBearer(auto_error=False, description="`Authorization: Bearer ifk_…`; not needed on loopback")


async def tenant(
    request: Request, credentials: Annotated[HTTPAuthorizationCredentials | None, Security(bearer)]
) -> str:
    """The caller's tenant. Raises Unauthorized."""
    services: Services = request.app.state.services
    if credentials is None or not credentials.credentials.startswith(KEY_PREFIX):
        if services.keys_required:
            raise Unauthorized("this API needs a key: Authorization: Bearer ifk_…", param="Authorization")
        return DEFAULT_TENANT
    # Looked up by its digest: how long that takes tells nothing about the digests that are there.
    record = await services.ledger.find_key(digest(credentials.credentials))
    if record is None:
        raise Unauthorized("this API key is unknown or was deleted", param="Authorization")
    return record["tenant"]


Tenant = Annotated[str, Depends(tenant)]
