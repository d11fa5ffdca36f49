"""Objects in buckets that are not ours: what batches read and leave there. Unlike a store it overwrites what is there.

What comes in is no file of ours, so there is no digest to compare it with: that an object stays the same while it is
read in pieces is for its ETag to say.
"""

import hashlib
from base64 import b64encode
from typing import IO, TYPE_CHECKING, Any

from inferfleet.tasks.errors import ObjectChanged, StoreUnavailable
from inferfleet.tasks.s3_url import S3Url
from inferfleet.tasks.stores.s3_store import make_client, persist

if TYPE_CHECKING:
    from inferfleet.tasks.settings import S3Settings

HASH_BYTES = 1 << 20


class Bucket:
    """Every call ends by the settings' deadline. Raises StoreUnavailable, StoreMisconfigured, OutputNotFound."""

    #: S3 takes no more in one request.
    MAX_WRITE_BYTES = 5 << 30

    def __init__(self, settings: "S3Settings") -> None:
        """Raises SettingsError where boto3 is not installed."""
        self._settings = settings
        self._client = make_client(settings)

    def look(self, url: S3Url) -> tuple[int, str]:
        """Bytes of an object, and its ETag."""
        answer = persist(lambda: self._client.head_object(Bucket=url.bucket, Key=url.key), self._settings)
        return answer["ContentLength"], answer["ETag"]

    def read(self, url: S3Url, etag: str, start: int, size: int) -> bytes:
        """`size` bytes from `start` on. Raises ObjectChanged if it is not the object of this ETag any more."""

        def attempt() -> bytes:
            answer = self._client.get_object(
                Bucket=url.bucket, Key=url.key, IfMatch=etag, Range=f"bytes={start}-{start + size - 1}"
            )
            # Not every server knows conditions, and one that knows no ranges would give all of it.
            if answer["ETag"] != etag:
                raise ObjectChanged
            data: bytes = answer["Body"].read(size + 1)
            if len(data) != size:
                raise StoreUnavailable(f"the store (S3) gave {len(data)} of {size} bytes")
            return data

        return persist(attempt, self._settings)

    def write(self, url: S3Url, file: IO[bytes], content_type: str) -> None:
        """All of a file, as one object."""
        sums: dict[str, Any] = {} if self._settings.checksums == "none" else {"ContentMD5": md5_of(file)}

        def attempt() -> None:
            file.seek(0)
            self._client.put_object(Bucket=url.bucket, Key=url.key, Body=file, ContentType=content_type, **sums)

        persist(attempt, self._settings)


def md5_of(file: IO[bytes]) -> str:
    """As the header Content-MD5 has it."""
    digest = hashlib.md5(usedforsecurity=False)
    file.seek(0)
    while data := file.read(HASH_BYTES):
        digest.update(data)
    return b64encode(digest.digest()).decode()
