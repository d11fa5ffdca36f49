"""Which URLs and addresses a webhook may go to: public ones, so that nobody reaches into our network through us.

A name is resolved once. Every one of its addresses must be allowed, and the connection is made to one of them, not to
the name again: an answer that changes between check and use changes nothing.
"""

import ipaddress
import socket
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue

from inferfleet.tasks.errors import UrlNotAllowed
from inferfleet.tasks.hook_url import PORTS, Address, BadUrl, HookUrl, parse_url
from inferfleet.tasks.settings import Settings

#: (host, port) -> addresses as text. Raises OSError.
Resolver = Callable[[str, int], Sequence[str]]

#: What `is_global` of some Python, or of none, lets pass: networks that are not public, lead to somebody's metadata
#: service, or carry an IPv4 address inside.
DENIED = tuple(
    ipaddress.ip_network(network)
    for network in (
        "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "168.63.129.16/32", "169.254.0.0/16",
        "172.16.0.0/12", "192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15",
        "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/3",
        "::/96", "::ffff:0:0:0/96", "64:ff9b::/96", "64:ff9b:1::/48", "100::/64", "2001::/23", "2001:db8::/32",
        "2002::/16", "3fff::/20", "5f00::/16", "fc00::/7", "fe80::/9", "ff00::/8",
    )
)  # fmt: skip

#: Names that a resolver is asked for at once; it takes no time limit, so a stuck one keeps its thread.
MAX_LOOKUPS = 64
_lookups = threading.BoundedSemaphore(MAX_LOOKUPS)


class ResolverFailed(OSError):
    """The name could not be resolved, or not in time."""


@dataclass(frozen=True)
class Policy:
    """What the operator allows."""

    #: http and port 80.
    insecure: bool = False
    #: This machine, over http and at any port.
    loopback: bool = False

    @classmethod
    def of(cls, settings: Settings) -> "Policy":
        return cls(settings.webhook_allow_insecure, settings.webhook_allow_loopback)

    def url(self, text: str, param: str = "webhook") -> HookUrl:
        """The URL, read. Raises UrlNotAllowed for one that no resolver could make right; `param` is its field."""
        try:
            url = parse_url(text)
        except BadUrl as error:
            raise UrlNotAllowed(str(error), param=param) from None
        if not self._is_public_style(url) and not self.loopback:
            schemes = "https (port 443)" + (" or http (port 80)" if self.insecure else "")
            raise UrlNotAllowed(f"a webhook's URL uses {schemes}, not {url.scheme} (port {url.port})", param=param)
        if _is_localhost(url.host) and not self.loopback:
            raise UrlNotAllowed(f"{url.host} is no public address, and a webhook may go to no other", param=param)
        if url.address is not None:
            try:
                self.addresses(url, [str(url.address)])
            except UrlNotAllowed:  # of an address that the caller spelt out there is nothing to hide
                raise UrlNotAllowed(
                    f"{url.host} is no public address, and a webhook may go to no other", param=param
                ) from None
        return url

    def addresses(self, url: HookUrl, found: Sequence[str]) -> list[Address]:
        """The addresses of a URL's host, each of them allowed. Raises UrlNotAllowed, which names none of them."""
        addresses = [_unwrapped(text) for text in found]
        for address in addresses:
            if self.loopback and address.is_loopback:
                continue
            if not self._is_public_style(url) or not is_public(address):
                raise UrlNotAllowed("a webhook may only go to a public address", param="webhook")
        return addresses

    def _is_public_style(self, url: HookUrl) -> bool:
        allowed = ("https", "http") if self.insecure else ("https",)
        return url.scheme in allowed and url.port in {PORTS[scheme] for scheme in allowed}


def is_public(address: Address) -> bool:
    """Whether an address, unwrapped, is one that everybody on the Internet means the same host by."""
    if any(address.version == network.version and address in network for network in DENIED):
        return False
    return address.is_global and not address.is_multicast


def _unwrapped(text: str) -> Address:
    address = ipaddress.ip_address(text.partition("%")[0])
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return address if mapped is None else mapped


def _is_localhost(host: str) -> bool:
    name = host.removesuffix(".")
    return name == "localhost" or name.endswith(".localhost")


def resolve(host: str, port: int) -> list[str]:
    """The system's resolver: every address of a name, once."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def within(resolver: Resolver, url: HookUrl, seconds: float) -> Sequence[str]:
    """What a resolver answers within some seconds. Raises ResolverFailed."""
    if url.address is not None:
        return [str(url.address)]
    if not _lookups.acquire(blocking=False):
        raise ResolverFailed("too many names are being resolved")
    answers: SimpleQueue[Sequence[str] | OSError | UnicodeError] = SimpleQueue()

    def look_up() -> None:
        try:
            answers.put(resolver(url.host, url.port))
        except (OSError, UnicodeError) as error:
            answers.put(error)
        finally:
            _lookups.release()

    threading.Thread(target=look_up, name="resolver", daemon=True).start()
    try:
        answer = answers.get(timeout=seconds)
    except Empty:
        raise ResolverFailed("the name was not resolved in time") from None
    if isinstance(answer, Exception) or not answer:
        raise ResolverFailed("the name could not be resolved")
    return answer
