"""One POST to a webhook's receiver: to a checked address, within a total time, reading little of the answer.

It follows no redirect, asks no proxy, keeps no connection and decodes nothing: an answer's status is all that counts.
"""

import ssl
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import httpcore2
from httpcore2 import NetworkBackend, NetworkStream

from inferfleet.tasks.errors import UrlNotAllowed
from inferfleet.tasks.hook_url import HookUrl
from inferfleet.workers.webhooks.guard import Policy, Resolver, ResolverFailed, resolve, within

CONNECT_SECONDS = 3.0
MAX_ANSWER_BYTES = 16 * 1024
KEPT_ANSWER_BYTES = 1024


@dataclass(frozen=True)
class Answer:
    """What came of an attempt: a status, or the error that kept it from one."""

    status: int | None = None
    error: str | None = None
    text: str = ""
    retry_after: str | None = None


class Deadline:
    """The end of an attempt on the monotonic clock."""

    def __init__(self, seconds: float) -> None:
        self._at = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds; raises ReadTimeout when there are none."""
        left = self._at - time.monotonic()
        if left <= 0:
            raise httpcore2.ReadTimeout("the attempt took too long")
        return left


class TimedStream(NetworkStream):
    """A connection whose every wait ends at the deadline, however little each of them brings."""

    def __init__(self, inner: NetworkStream, deadline: Deadline) -> None:
        self._inner = inner
        self._deadline = deadline

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._inner.read(max_bytes, self._deadline.left())

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._inner.write(buffer, self._deadline.left())

    def close(self) -> None:
        self._inner.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> NetworkStream:
        seconds = min(CONNECT_SECONDS, self._deadline.left())
        return TimedStream(self._inner.start_tls(ssl_context, server_hostname, seconds), self._deadline)

    def get_extra_info(self, info: str) -> Any:
        return self._inner.get_extra_info(info)


class GuardedBackend(NetworkBackend):
    """Connects to the checked addresses of one URL; httpcore never learns of the name's resolution."""

    def __init__(self, url: HookUrl, policy: Policy, resolver: Resolver, deadline: Deadline) -> None:
        self._url = url
        self._policy = policy
        self._resolver = resolver
        self._deadline = deadline

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> NetworkStream:
        connecting = Deadline(min(CONNECT_SECONDS, self._deadline.left()))
        found = within(self._resolver, self._url, connecting.left())
        failed: Exception = httpcore2.ConnectError("there is no address")
        for address in self._policy.addresses(self._url, found):
            try:
                inner = httpcore2.SyncBackend().connect_tcp(str(address), port, connecting.left(), socket_options=[])
                return TimedStream(inner, self._deadline)
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout) as error:
                failed = error
        raise failed


class Sender:
    """Sends webhooks. Threads may share it."""

    def __init__(
        self,
        policy: Policy,
        *,
        seconds: float = 10.0,
        resolver: Resolver = resolve,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        self._policy = policy
        self._seconds = seconds
        self._resolver = resolver
        self._ssl_context = ssl_context or ssl.create_default_context()

    def post(self, text: str, headers: Mapping[str, str], body: bytes) -> Answer:
        """Never raises for what a URL, a network or a receiver does."""
        try:
            return self._post(self._policy.url(text), headers, body)
        except UrlNotAllowed:
            return Answer(error="url_not_allowed")
        except ResolverFailed:
            return Answer(error="name_not_resolved")
        except httpcore2.TimeoutException:
            return Answer(error="timeout")
        except httpcore2.ConnectError as error:
            return Answer(error="tls_failed" if isinstance(error.__cause__, ssl.SSLError) else "connection_refused")
        except httpcore2.NetworkError:
            return Answer(error="connection_lost")
        except httpcore2.ProtocolError:
            return Answer(error="not_http")

    def _post(self, url: HookUrl, headers: Mapping[str, str], body: bytes) -> Answer:
        origin = httpcore2.Origin(url.scheme.encode(), url.host.encode(), url.port)
        sent = {
            "host": url.authority,
            "user-agent": "inferfleet",
            "content-type": "application/json",
            "content-length": str(len(body)),
            "accept-encoding": "identity",
            "connection": "close",
            **headers,
        }
        request = httpcore2.Request(
            b"POST",
            httpcore2.URL(scheme=origin.scheme, host=origin.host, port=origin.port, target=url.target.encode()),
            headers=[(name.encode(), value.encode()) for name, value in sent.items()],
            content=body,
        )
        backend = GuardedBackend(url, self._policy, self._resolver, Deadline(self._seconds))
        connection = httpcore2.HTTPConnection(origin, ssl_context=self._ssl_context, network_backend=backend)
        try:
            return _read(connection.handle_request(request))
        finally:
            connection.close()


def _read(response: httpcore2.Response) -> Answer:
    """Status and the beginning of the body. What happens to the body changes no status that has come."""
    headers = {name.lower(): value.decode("latin-1") for name, value in response.headers}
    parts: list[bytes] = []
    size = 0
    try:
        for part in response.iter_stream():
            parts.append(part)
            size += len(part)
            if size >= MAX_ANSWER_BYTES:
                break
    except (httpcore2.TimeoutException, httpcore2.NetworkError, httpcore2.ProtocolError):
        pass
    kept = b"".join(parts)[:KEPT_ANSWER_BYTES]
    # What came coded although it was not asked for would be noise.
    text = "" if headers.get(b"content-encoding", "identity") != "identity" else kept.decode(errors="replace")
    return Answer(response.status, text=text, retry_after=headers.get(b"retry-after"))
