"""API keys: how one is made and what is kept of it. Knows no HTTP, so the command line needs no server installed."""

import hashlib
import secrets

#: Marks a string as one of our keys: a mistyped key is refused even where none is needed, while the placeholder
#: that the OpenAI SDK insists on (`api_key="none"`) is not.
KEY_PREFIX = "ifk_"


def new_key() -> str:
    """A fresh key with 256 bits of randomness."""
    return KEY_PREFIX + secrets.token_urlsafe(32)


def digest(key: str) -> str:
    """What is stored of a key. It needs no salt or stretching: nobody guesses 256 random bits."""
    return hashlib.sha256(key.encode()).hexdigest()
