"""Urls that open one picture for a while without an API key. Pure: knows no Redis and no HTTP.

A signature is HMAC-SHA256 over the output's id and the second at which the url expires, with a secret of the namespace.
"""

import hashlib
import hmac
import re
import time

from inferfleet.tasks.errors import InvalidSignature, UrlExpired

ROUTE = "/v1/outputs"
EXPIRES = re.compile(r"[0-9]{1,12}", re.ASCII)


def signed_url(base: str, output_id: str, expires_at: int, secret: bytes) -> str:
    """`base` is scheme and host, without a slash at its end; `expires_at` in Unix seconds."""
    return f"{base}{ROUTE}/{output_id}?expires={expires_at}&signature={signature(output_id, str(expires_at), secret)}"


def check_signature(output_id: str, expires: str, given: str, secret: bytes) -> int:
    """The second at which the url expires. Raises InvalidSignature, UrlExpired."""
    if not EXPIRES.fullmatch(expires) or not hmac.compare_digest(
        signature(output_id, expires, secret).encode(), given.encode("utf-8", "replace")
    ):
        raise InvalidSignature("the url's signature does not fit: use it as it came, whole", param="signature")
    # Only now: who cannot sign learns nothing about when what expires.
    if int(expires) <= time.time():
        raise UrlExpired("the url has expired: ask for the job again, or use an API key", param="expires")
    return int(expires)


def signature(output_id: str, expires: str, secret: bytes) -> str:
    return hmac.new(secret, f"{output_id}\n{expires}".encode(), hashlib.sha256).hexdigest()
