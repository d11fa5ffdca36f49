"""Standard Webhooks signatures (HMAC-SHA256, version v1): headers that prove who sent a body, and when."""

import base64
import hashlib
import hmac
from collections.abc import Sequence

from inferfleet.tasks.webhooks import SECRET_PREFIX


def signed_headers(message_id: str, timestamp: int, body: bytes, secrets: Sequence[str]) -> dict[str, str]:
    """The three headers of one attempt; timestamp in Unix seconds. While a secret rotates there are two signatures."""
    signed = f"{message_id}.{timestamp}.".encode() + body
    return {
        "webhook-id": message_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": " ".join(f"v1,{signature(secret, signed)}" for secret in secrets),
    }


def signature(secret: str, signed: bytes) -> str:
    key = base64.b64decode(secret.removeprefix(SECRET_PREFIX))
    return base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()
