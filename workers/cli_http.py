"""The command line's HTTP client of the API: JSON, files, server-sent events; every failure a FleetError."""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import IO, Any

import httpx2

from inferfleet.tasks.errors import FleetError, NotFound, Unavailable, from_dict

#: A completion may wait its turn in the queue for long: reading is only bounded by the server's keep-alive.
TIMEOUT = httpx2.Timeout(10.0, read=None)
SHORT = httpx2.Timeout(1.0)
#: What may stand in a route as it is.
ID = re.compile(r"[A-Za-z0-9_-]+")


class ApiUnreachable(Unavailable):
    """Nothing answers at the API's address."""

    code = "api_unreachable"


class ApiClient:
    """Speaks to one API. `request` returns parsed JSON; `stream` yields the data of server-sent events."""

    def __init__(self, url: str, api_key: str | None = None, timeout: httpx2.Timeout = TIMEOUT) -> None:
        self.url = url.rstrip("/")
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        # A proxy from the environment must not be asked for a server on this very machine.
        local = httpx2.URL(self.url).host in ("127.0.0.1", "localhost", "::1")
        self._http = httpx2.Client(base_url=self.url, headers=headers, timeout=timeout, trust_env=not local)

    def __enter__(self) -> "ApiClient":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def request(
        self,
        method: str,
        path: str,
        *,
        body: Any = None,
        params: dict[str, str] | None = None,
        headers: dict[str, str] | None = None,
    ) -> dict[str, Any]:
        """One call. Raises the FleetError that the API answered with, or ApiUnreachable."""
        content, own = _json(body)
        with self._reaching():
            response = self._http.request(method, path, params=params, content=content, headers=own | (headers or {}))
            _raise_for_error(response)
            answer: dict[str, Any] = response.json() if response.content else {}
            return answer

    def page(
        self, collection: str, limit: int, given: Mapping[str, str | None], labels: Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        """A page of a collection: as the given parameters that are not empty say, of what carries the labels.

        Errors as in `request`.
        """
        params = {"limit": str(limit)} | {name: value for name, value in given.items() if value}
        params |= {f"metadata[{key}]": value for key, value in (labels or {}).items()}
        return self.request("GET", collection, params=params)

    def read(self, path: str) -> bytes:
        """A file of the API. Errors as in `request`."""
        with self._reaching():
            response = self._http.get(path)
            _raise_for_error(response)
            return bytes(response.content)

    def upload(
        self, path: str, name: str, file: IO[bytes], fields: Mapping[str, str], headers: dict[str, str] | None = None
    ) -> dict[str, Any]:
        """POST a form with a file, which is read as it is sent. Errors as in `request`."""
        form = {"file": (name, file)}
        with self._reaching():
            response = self._http.post(path, data=dict(fields), files=form, headers=headers)
            _raise_for_error(response)
            answer: dict[str, Any] = response.json()
            return answer

    @contextmanager
    def download(
        self, path: str, params: dict[str, str] | None = None
    ) -> Iterator[tuple[httpx2.Headers, Iterator[bytes]]]:
        """The headers of an answer and its bytes, as they come. Errors as in `request`."""
        with self._reaching(), self._http.stream("GET", path, params=params) as response:
            if response.status_code >= 400:
                response.read()
                _raise_for_error(response)
            yield response.headers, response.iter_bytes()

    def stream(self, method: str, path: str, *, body: Any = None) -> Iterator[dict[str, Any]]:
        """The events of a stream until `[DONE]` or its end; an error inside the stream is raised."""
        content, headers = _json(body)
        with self._reaching(), self._http.stream(method, path, content=content, headers=headers) as response:
            if response.status_code >= 400:
                response.read()
                _raise_for_error(response)
            for line in response.iter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                event = json.loads(line[len("data: ") :])
                if isinstance(event.get("error"), dict) and "object" not in event and "type" not in event:
                    raise from_dict(event["error"])
                yield event

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        try:
            yield
        except httpx2.TransportError as error:
            raise ApiUnreachable(f"no answer from the API at {self.url}: {error or type(error).__name__}") from error


def path_to(collection: str, identifier: str, missing: type[NotFound]) -> str:
    """The route of one of a collection. An id that could lead to another route is nobody's: `missing`."""
    if not ID.fullmatch(identifier):
        raise missing()
    return f"{collection}/{identifier}"


def _json(body: Any) -> tuple[bytes | None, dict[str, str]]:
    if body is None:
        return None, {}
    return json.dumps(body).encode(), {"content-type": "application/json"}


def _raise_for_error(response: httpx2.Response) -> None:
    if response.status_code < 400:
        return
    try:
        error = response.json()["error"]
    except (ValueError, KeyError, TypeError):
        raise FleetError(f"HTTP {response.status_code} from {response.url}: not an inferfleet API?") from None
    raise from_dict(error)
