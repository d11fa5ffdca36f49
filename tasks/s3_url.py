"""The form of s3://bucket/key as batches name their input and their output, and whether a tenant may use it. Asks
no server: who may read and write where is the operator's to say, since all is done with the fleet's own keys.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

#: S3 takes 1024 bytes of a key; the names of a batch's files come behind a prefix.
MAX_KEY_BYTES = 900
MAX_URL_CHARS = 1000

_URL = re.compile(r"s3://([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])/([^\x00-\x1f\x7f]*)")


class BadS3Url(ValueError):
    """The text is no s3://bucket/key."""


@dataclass(frozen=True)
class S3Url:
    bucket: str
    #: Of a prefix, with a slash at its end unless it is empty.
    key: str

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.key}"

    @property
    def name(self) -> str:
        """What stands behind the last slash."""
        return self.key.rpartition("/")[2]


def parse_object(text: str) -> S3Url:
    """The url of one object. Raises BadS3Url."""
    url = _parse(text)
    if not url.name:
        raise BadS3Url("the url of an object is s3://bucket/key")
    return url


def parse_prefix(text: str) -> S3Url:
    """The url of what objects' names begin with, with or without a slash at its end. Raises BadS3Url."""
    return _parse(text if text.endswith("/") else text + "/")


def _parse(text: str) -> S3Url:
    found = _URL.fullmatch(text)
    if not found:
        raise BadS3Url("an s3 url is s3://bucket/key")
    bucket, key = found.groups()
    if len(key.encode("utf-8", "replace")) > MAX_KEY_BYTES:
        raise BadS3Url(f"the key of an s3 url has at most {MAX_KEY_BYTES} bytes")
    # Some servers and proxies tidy paths: then a key could lead out of the prefix that it seems to lie in.
    if any(step in ("", ".", "..") for step in key.removesuffix("/").split("/") if key):
        raise BadS3Url("no step of an s3 url's key may be empty, . or ..")
    return S3Url(bucket, key)


def lies_in(url: str, prefixes: Sequence[str]) -> bool:
    """Whether one of the prefixes is the beginning of the url. All of them were read by parse_object or parse_prefix,
    so that a prefix ends with a slash."""
    return any(url.startswith(prefix) for prefix in prefixes)
