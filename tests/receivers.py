"""Receivers of webhooks on loopback, good and bad ones: what they do with a request is one function of a socket."""

import contextlib
import functools
import gzip
import socket
import ssl
import struct
import threading
import time
from dataclasses import dataclass
from pathlib import Path

CERTIFICATES = Path(__file__).with_name("certificates")
ABORT = struct.pack("ii", 1, 0)


@dataclass(frozen=True)
class Request:
    line: str
    headers: dict[str, str]
    body: bytes


def answer(status=200, headers="", body=b""):
    """A behaviour: this answer, at once."""

    def behave(connection):
        head = f"HTTP/1.1 {status} X\r\n{headers}content-length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)

    return behave


def reset(connection):
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, ABORT)


def silence(connection):
    connection.settimeout(30)
    connection.recv(1)


def drip(connection):
    """One byte of a header every tenth of a second, for ever."""
    for byte in b"HTTP/1.1 200 OK\r\nx-slow: " + b"a" * 1000:
        connection.sendall(bytes([byte]))
        time.sleep(0.1)


def endless_body(connection):
    """A gigabyte, if anybody reads it."""
    connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 1073741824\r\n\r\n")
    for _ in range(16384):
        connection.sendall(b"x" * 65536)


def endless_headers(connection):
    connection.sendall(b"HTTP/1.1 200 OK\r\n")
    for _ in range(100_000):
        connection.sendall(b"x-header: " + b"y" * 1000 + b"\r\n")


def endless_hints(connection):
    """Interim answers without an end."""
    while True:
        connection.sendall(b"HTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\n" * 100)


@functools.cache
def bomb():
    """64 MiB of zeros, packed twice into a few hundred bytes."""
    return gzip.compress(gzip.compress(bytes(64 << 20), 1))


def gzip_bomb(connection):
    body = bomb()
    head = f"HTTP/1.1 200 OK\r\ncontent-encoding: gzip, gzip\r\ncontent-length: {len(body)}\r\n\r\n"
    connection.sendall(head.encode() + body)


def nonsense(connection):
    connection.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")


def dripping_body(connection):
    connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n")
    for _ in range(1000):
        connection.sendall(b"x")
        time.sleep(0.1)


class Receiver:
    """A server whose `behaviours` are used up one a request, the last one for ever; a plain status is an answer."""

    def __init__(self, *behaviours, certificate=None, host="127.0.0.1"):
        self._behaviours = [answer(each) if isinstance(each, int) else each for each in behaviours or (200,)]
        self.requests = []
        self.connections = 0
        self.at_once = self.most_at_once = 0
        self._lock = threading.Lock()
        self._tls = None
        if certificate is not None:
            self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._tls.load_cert_chain(CERTIFICATES / certificate, CERTIFICATES / "key.pem")
        self._listener = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        self.port = self._listener.getsockname()[1]

    def __enter__(self):
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc):
        # Closing alone wakes no accept(), and one that a signal restarts would accept for whoever got the number since.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}/hook"

    def events(self):
        """The webhook-ids, as they came."""
        return [request.headers["webhook-id"] for request in list(self.requests)]

    def _accept(self):
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection):
        with contextlib.suppress(OSError, ValueError), contextlib.ExitStack() as open_things:
            if self._tls is not None:
                connection.settimeout(5)
                connection = self._tls.wrap_socket(connection, server_side=True)
            open_things.enter_context(connection)
            with self._lock:
                self.at_once += 1
                self.most_at_once = max(self.most_at_once, self.at_once)
            try:
                self.requests.append(read_request(connection))
                with self._lock:
                    behave = self._behaviours.pop(0) if len(self._behaviours) > 1 else self._behaviours[0]
                behave(connection)
            finally:
                with self._lock:
                    self.at_once -= 1


def read_request(connection):
    connection.settimeout(10)
    data = b""
    while b"\r\n\r\n" not in data:
        chunk = connection.recv(65536)
        if not chunk:
            raise ValueError("no request")
        data += chunk
    head, _, body = data.partition(b"\r\n\r\n")
    line, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (each.partition(":") for each in lines)}
    while len(body) < int(headers.get("content-length", 0)):
        body += connection.recv(65536)
    connection.settimeout(None)
    return Request(line, headers, body)
