"""API keys: how one is made, what is kept of it, where none is needed. Knows no HTTP: the command line uses it too."""

import hashlib
import ipaddress
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


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
