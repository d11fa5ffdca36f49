"""The form of a webhook's URL, read once and strictly: what is checked is what is connected to. Resolves no name.

Two readers of one URL that disagree on its host are how a guard is walked around, so every spelling that they could
read in two ways is refused: user names, backslashes, letters beyond ASCII, numbers that only look like an address.
"""

import ipaddress
import re
from dataclasses import dataclass

MAX_URL_CHARS = 2048
PORTS = {"https": 443, "http": 80}

_URL = re.compile(r"(?i:(https?))://(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+)(?::(\d{1,5}))?([/?][!-~]*)?")
_LABEL = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)")
#: A last label like this makes some readers take the whole host for an IPv4 address.
_NUMBER = re.compile(r"\d+|0[xX][0-9a-fA-F]*")

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class BadUrl(ValueError):
    """The URL is not one of a webhook."""


@dataclass(frozen=True)
class HookUrl:
    scheme: str
    #: A name, or an address without brackets.
    host: str
    port: int
    #: Path and query as they go into the request line.
    target: str
    #: None where the host is a name.
    address: Address | None

    @property
    def authority(self) -> str:
        """For the Host header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == PORTS[self.scheme] else f"{host}:{self.port}"


def parse_url(url: str) -> HookUrl:
    """Raises BadUrl with what is wrong."""
    if len(url) > MAX_URL_CHARS:
        raise BadUrl(f"the URL has {len(url)} characters, the limit is {MAX_URL_CHARS}")
    found = _URL.fullmatch(url)
    if not found:
        raise BadUrl("not an absolute http(s) URL in plain ASCII without user name, backslash or spaces")
    scheme, host, port, rest = found[1].lower(), found[2].lower(), found[3], found[4] or "/"
    if "#" in rest or "\\" in rest:
        raise BadUrl("a webhook's URL holds no fragment and no backslash")
    number = int(port) if port else PORTS[scheme]
    if not 1 <= number <= 65535:
        raise BadUrl(f"{number} is no port")
    host = host[1:-1] if host.startswith("[") else host
    return HookUrl(scheme, host, number, rest if rest.startswith("/") else f"/{rest}", _address(host))


def _address(host: str) -> Address | None:
    """The address that a host spells out; None for a name. Raises BadUrl for what could be taken for either."""
    if ":" in host:
        try:
            return ipaddress.IPv6Address(host)
        except ValueError:
            raise BadUrl(f"[{host}] is no IPv6 address") from None
    labels = host.removesuffix(".").split(".")
    if _NUMBER.fullmatch(labels[-1]):
        try:
            return ipaddress.IPv4Address(host)
        except ValueError:
            raise BadUrl(f"{host} is no IPv4 address in four decimal parts") from None
    if len(host) > 253 or not all(_LABEL.fullmatch(label) for label in labels):
        raise BadUrl(f"{host[:100]} is no host name")
    return None
