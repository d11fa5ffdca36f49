"""Files in a bucket of S3, or of a server that speaks it. Loads boto3 when the first store is made.

A key is written once, by one run of one job, so nothing here relies on conditional writes, which differ from server to
server. Every call has an end: each attempt has timeouts, and no new attempt begins when the call's time is over. What
the server says of an object is not believed: its bytes are compared with the digest that whoever asks holds.
"""

import asyncio
import base64
import functools
import hashlib
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, TypeVar

from inferfleet.tasks.errors import (
    FleetError,
    ObjectChanged,
    OutputDamaged,
    OutputNotFound,
    SettingsError,
    StoreMisconfigured,
    StoreUnavailable,
)
from inferfleet.tasks.stores.store import StoredObject, check_digest

if TYPE_CHECKING:
    from inferfleet.tasks.settings import S3Settings

T = TypeVar("T")

FIRST_WAIT, LONGEST_WAIT = 0.1, 2.0
#: The wire does not damage a file so often in a row: then it is the file.
MAX_DAMAGED = 3
#: S3 deletes at most so many keys in one request.
MAX_FORGET = 1000
#: A link to a file can be shown to others, so it does not live long.
MAX_PRESIGN_SECONDS = 7 * 86400
#: Calls that one process has under way; each holds a thread and a connection.
CALLS_AT_ONCE = 16
#: What a server says when a bucket or a credential is wrong: asking again cannot help, an operator has to.
WRONG_SETUP = {
    "AccessDenied", "AllAccessDisabled", "AuthorizationHeaderMalformed", "ExpiredToken", "InvalidAccessKeyId",
    "InvalidBucketName", "InvalidToken", "NoSuchBucket", "PermanentRedirect", "RequestTimeTooSkewed",
    "SignatureDoesNotMatch",
}  # fmt: skip


@dataclass(frozen=True)
class Found:
    """An object that is in the bucket, as a listing tells."""

    key: str
    modified: datetime
    size_bytes: int


class S3Store:
    """The store for threads; one object may be shared by all of them."""

    in_ledger = False

    def __init__(self, bucket: str, prefix: str, settings: "S3Settings") -> None:
        """prefix: put before every key, such as `results/`."""
        self._bucket = bucket
        self._prefix = prefix
        self._settings = settings
        self._client = make_client(settings)

    def put(self, key: str, data: bytes, content_type: str) -> StoredObject:
        stored = StoredObject.of(key, data, content_type)
        sums = checksums(self._settings.checksums, data)
        arguments = {"Key": self._prefix + key, "Body": data, "ContentType": content_type, **sums}

        def write() -> StoredObject:
            self._call("put_object", **arguments)
            # A server without checksums may keep a torn body, and one that answers for a cache may keep none.
            size = self._call("head_object", Key=self._prefix + key)["ContentLength"]
            if size != stored.size_bytes:
                raise OutputDamaged(f"{size} of {stored.size_bytes} bytes of {key} arrived", param="output_id")
            return stored

        return self._persist(write)

    def get(self, key: str, sha256: str) -> bytes:
        def read() -> bytes:
            data: bytes = self._call("get_object", Key=self._prefix + key)["Body"].read()
            return check_digest(key, data, sha256)

        return self._persist(read)

    def forget(self, keys: Sequence[str]) -> None:
        for start in range(0, len(keys), MAX_FORGET):
            names = [{"Key": self._prefix + key} for key in keys[start : start + MAX_FORGET]]

            def remove(names: list[dict[str, str]] = names) -> None:
                answer = self._call("delete_objects", Delete={"Objects": names, "Quiet": True})
                kept = [error for error in answer.get("Errors", []) if error.get("Code") != "NoSuchKey"]
                if kept:
                    raise StoreUnavailable(f"the store kept {len(kept)} of {len(names)} files that it should delete")

            self._persist(remove)

    def check(self) -> None:
        """Ask once whether the bucket is there and lets us in. Raises StoreMisconfigured or StoreUnavailable."""
        self._persist(lambda: self._call("head_bucket"))

    def presign(self, key: str, *, content_type: str, filename: str, seconds: int) -> str | None:
        """A link that gives a file to whoever has it. The type is ours and the file is saved, never shown: a picture
        that is a page would run as one on the store's own address."""
        params = {
            "Bucket": self._bucket,
            "Key": self._prefix + key,
            "ResponseContentType": content_type,
            "ResponseContentDisposition": f'attachment; filename="{filename}"',
        }
        seconds = max(1, min(seconds, MAX_PRESIGN_SECONDS))
        url: str = self._client.generate_presigned_url("get_object", Params=params, ExpiresIn=seconds)
        return url

    def scan(self, after: str = "", limit: int = 1000) -> list[Found]:
        """Up to `limit` (at most 1000) objects behind a key, in the order of their keys; fewer = there are no more."""
        behind = {"StartAfter": self._prefix + after} if after else {}
        answer = self._persist(
            lambda: self._call("list_objects_v2", Prefix=self._prefix, MaxKeys=limit, **behind),
        )
        cut = len(self._prefix)
        return [Found(item["Key"][cut:], item["LastModified"], item["Size"]) for item in answer.get("Contents", [])]

    def _call(self, verb: str, **arguments: Any) -> Any:
        return getattr(self._client, verb)(Bucket=self._bucket, **arguments)

    def _persist(self, attempt: Callable[[], T]) -> T:
        return persist(attempt, self._settings)


def persist(attempt: Callable[[], T], settings: "S3Settings") -> T:
    """The result of `attempt`, which may be made again. A file that arrives damaged may have been damaged on its way,
    so it is asked for again too. Raises what `judged` makes of an error."""
    give_up = time.monotonic() + settings.deadline_seconds
    wait, num_damaged = FIRST_WAIT, 0
    while True:
        try:
            return attempt()
        except Exception as error:
            verdict = judged(error)
            pause = wait * random.uniform(0.5, 1.0)
            num_damaged += isinstance(verdict, OutputDamaged)
            hopeful = isinstance(verdict, StoreUnavailable) and not isinstance(verdict, StoreMisconfigured)
            hopeful = hopeful or 0 < num_damaged < MAX_DAMAGED
            if not hopeful or time.monotonic() + pause >= give_up:
                raise verdict from error
        time.sleep(pause)
        wait = min(2 * wait, LONGEST_WAIT)


class AsyncS3Store:
    """The store for one event loop: boto3 blocks, so its calls wait in threads of their own."""

    in_ledger = False

    def __init__(self, store: S3Store) -> None:
        self._store = store
        self._threads = ThreadPoolExecutor(CALLS_AT_ONCE, thread_name_prefix="s3")

    async def put(self, key: str, data: bytes, content_type: str) -> StoredObject:
        return await self._run(functools.partial(self._store.put, key, data, content_type))

    async def get(self, key: str, sha256: str) -> bytes:
        return await self._run(functools.partial(self._store.get, key, sha256))

    async def forget(self, keys: Sequence[str]) -> None:
        await self._run(functools.partial(self._store.forget, keys))

    def presign(self, key: str, *, content_type: str, filename: str, seconds: int) -> str | None:
        """As S3Store.presign: computed here, nobody is asked."""
        return self._store.presign(key, content_type=content_type, filename=filename, seconds=seconds)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _run(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, call)


def make_client(settings: "S3Settings") -> Any:
    """A boto3 client. Keys that the settings leave out come from where boto3 looks: the environment, files, the
    machine's role. Raises SettingsError where boto3 is not installed."""
    try:
        import boto3
        from botocore.config import Config
    except ModuleNotFoundError:
        raise SettingsError("s3:// needs boto3: pip install 'inferfleet[s3]'", param="result_store") from None
    secret = settings.secret_access_key
    config = Config(
        signature_version="s3v4",
        connect_timeout=settings.connect_timeout_seconds,
        read_timeout=settings.read_timeout_seconds,
        retries={"total_max_attempts": 1, "mode": "standard"},  # repeats are ours: they end with the call's deadline
        max_pool_connections=CALLS_AT_ONCE,
        s3={"addressing_style": settings.addressing_style},
        # Its own CRC travels in a trailer that older servers take for a part of the file. Ours is in `checksums`.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    return boto3.session.Session().client(
        "s3",
        endpoint_url=settings.endpoint_url,
        region_name=settings.region,
        aws_access_key_id=settings.access_key_id,
        aws_secret_access_key=None if secret is None else secret.get_secret_value(),
        config=config,
    )


def checksums(mode: str, data: bytes) -> dict[str, str]:
    """The header by which the server sees that all of a file arrived."""
    if mode == "sha256":
        return {"ChecksumSHA256": base64.b64encode(hashlib.sha256(data).digest()).decode()}
    if mode == "md5":
        return {"ContentMD5": base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()}
    return {}


def judged(error: Exception) -> FleetError:
    """What an error of boto3 means here: StoreUnavailable may be asked again, others may not. Unknown ones go on up."""
    from botocore import exceptions

    if isinstance(error, FleetError):
        return error
    if isinstance(error, exceptions.ClientError):
        return judged_answer(error)
    if isinstance(error, exceptions.NoCredentialsError | exceptions.PartialCredentialsError):
        return StoreMisconfigured("the store (S3) needs s3.access_key_id and s3.secret_access_key", param="s3")
    if isinstance(error, exceptions.ParamValidationError):
        return StoreMisconfigured(f"the store (S3) cannot be asked: {error}", param="result_store")
    if isinstance(error, exceptions.BotoCoreError | OSError):
        return StoreUnavailable(f"the store (S3) does not answer: {type(error).__name__}", retry_after=5)
    raise error


def judged_answer(error: Any) -> FleetError:
    """The same of an answer that is an error."""
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    code = error.response.get("Error", {}).get("Code", "")
    if code == "NoSuchKey" or (code in ("404", "NotFound") and error.operation_name == "HeadObject"):
        return OutputNotFound(param="output_id")
    if status == 412:
        return ObjectChanged()
    if code in WRONG_SETUP or status in (301, 401, 403, 404):
        return StoreMisconfigured(f"the store (S3) refuses: {code or status}", param="s3", retry_after=30)
    return StoreUnavailable(f"the store (S3) cannot do this now: {code or status}", retry_after=5)
