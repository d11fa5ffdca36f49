"""Calls about files: what a tenant uploads and what batches write. Knows their parts, not the store that holds these.

A file is a row of parts, each an object in the store with its digest; so none is ever whole in anybody's memory.
"""

import json
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from inferfleet.tasks.call import Call, Key, Steps, opt, text, to_json
from inferfleet.tasks.calls import ENTRIES_PER_SCAN, check_idempotency_key, idempotency_digest
from inferfleet.tasks.errors import FileInUse, FileNotFound, IdempotencyKeyReuse, OutputNotFound

#: Bytes of one part, except the last of a file.
PART_BYTES = 4 << 20
#: An upload that has not ended after this is forgotten.
UPLOAD_SECONDS = 86400
#: How long files live that name no time of their own.
DEFAULT_SECONDS = 30 * 86400
MAX_FILES_PAGE = 1000
SDK_MEMORY_MS = 600_000

#: Of pictures, uploads and the shelves of batches.
OUR_KEYS = re.compile(r"(out_[0-9a-f]{32}|file-[0-9a-f]{32}|batch_[0-9a-f]{32})_[0-9]+_[0-9]+")
FILE_ID = re.compile(r"file-[0-9a-f]{32}")

Kind = Literal["", "output", "error"]


@dataclass(frozen=True)
class Part:
    """One object in the store."""

    key: str
    size: int
    #: Hexadecimal.
    sha256: str
    #: Only of a batch's shelf: whole lines in it.
    lines: int = 0


@dataclass(frozen=True)
class FileRecord:
    """A file as it is listed. Times are Unix milliseconds."""

    id: str
    tenant: str
    filename: str
    purpose: str
    size: int
    created_ms: int
    expires_ms: int
    shelf: str
    #: Which lines of a batch's shelf it shows; '' = all bytes.
    kind: Kind


def new_file_id() -> str:
    """`file-` and 32 hexadecimal digits, random."""
    return f"file-{uuid.uuid4().hex}"


def part_key(shelf: str, fence: int, n: int) -> str:
    """The key of a part in the store: another run of a batch writes another."""
    return f"{shelf}_{fence}_{n}"


def open_file(file_id: str, tenant: str, filename: str, purpose: str) -> Call[None]:
    """Begin an upload: parts may follow."""
    return Call("file_open", (file_id, tenant, filename, purpose, 1000 * UPLOAD_SECONDS), lambda answer: None)


def add_part(file_id: str, n: int, part: Part, *, in_ledger: bool) -> Call[None]:
    """Put part n, which lies in the store, on a file that is on its way."""

    def parse(answer: bytes) -> None:
        if answer == b"gone":
            raise FileNotFound(param="file_id")
        if answer == b"missing":
            raise OutputNotFound(f"part {n} of {file_id} is not in the store", param="file")

    return Call("file_part", (file_id, n, part.key, to_json(asdict(part)), "1" if in_ledger else ""), parse)


@dataclass(frozen=True)
class Closed:
    """The file that an upload made, or the earlier one that it repeats; and parts that nobody needs then."""

    file_id: str
    replayed: bool
    dropped: list[str]


def close_file(
    file_id: str,
    size: int,
    seconds: int,
    *,
    body_hash: str,
    idempotency: tuple[str, bool, bool] | None = None,
) -> Call[Closed]:
    """End an upload. `idempotency` = (digest, whether to look for an earlier file, whether it is the caller's own key,
    which lives as long as the file). Raises IdempotencyKeyReuse; the parts are dropped then, too."""
    digest, look, own = idempotency or ("", False, False)
    memory = "" if own else SDK_MEMORY_MS

    def parse(answer: list[bytes]) -> Closed:
        verdict, rest = text(answer[0]), [text(key) for key in answer[1:]]
        if verdict == "gone":
            raise FileNotFound(param="file_id")
        if verdict == "reuse":
            raise ReusedForFile(dropped=rest)
        return Closed(rest[0] if verdict == "replay" else file_id, verdict == "replay", rest[1:])

    args = (file_id, size, seconds, digest, memory, "1" if look else "", body_hash)
    return Call("file_close", args, parse)


class ReusedForFile(IdempotencyKeyReuse):
    """This idempotency key was already used for another file."""

    def __init__(self, message: str | None = None, *, dropped: Sequence[str] = ()) -> None:
        super().__init__(message)
        #: Parts of the upload that was refused.
        self.dropped = dropped


def file_digest(tenant: str, key: str) -> str:
    """The digest of a caller's own key for uploads."""
    check_idempotency_key(key, "Idempotency-Key")
    return idempotency_digest(tenant, f"files:{key}")


def get_file(file_id: str, tenant: str | None = None) -> Call[FileRecord]:
    """One file. Another tenant's is not found."""

    def parse(answer: Any) -> FileRecord:
        if not answer:
            raise FileNotFound(param="file_id")
        return file_record(file_id, answer)

    return Call("file_get", (file_id, opt(tenant)), parse)


def file_record(file_id: str, answer: Any) -> FileRecord:
    fields = as_fields(answer)
    return FileRecord(
        id=file_id,
        tenant=fields["tenant"],
        filename=fields["filename"],
        purpose=fields["purpose"],
        size=int(fields["bytes"]),
        created_ms=int(fields["created_ms"]),
        expires_ms=int(fields["expires_ms"]),
        shelf=fields["shelf"],
        kind=fields["kind"],  # type: ignore[arg-type]
    )


def as_fields(answer: Any) -> dict[str, str]:
    """HGETALL's answer, a list under RESP2 and inside scripts, a dict under RESP3."""
    if isinstance(answer, Mapping):
        pairs = list(answer.items())
    else:
        pairs = list(zip(answer[::2], answer[1::2], strict=True))
    return {text(name): text(value) for name, value in pairs}


@dataclass(frozen=True)
class FilePage:
    files: list[FileRecord]
    has_more: bool


def list_files(
    tenant: str, purpose: str | None = None, after: str | None = None, limit: int = 100, order: str = "desc"
) -> Steps[FilePage]:
    """A tenant's files by age. `after` is the last id of the page before."""
    found: list[FileRecord] = []
    cursor = ""
    while True:
        args = (tenant, opt(purpose), opt(after), cursor, limit + 1 - len(found), ENTRIES_PER_SCAN, order)
        cursor, more = yield Call("file_list", args, parse_files)
        found += more
        if not cursor or len(found) > limit:
            return FilePage(found[:limit], has_more=len(found) > limit)


def parse_files(answer: list[Any] | None) -> tuple[str, list[FileRecord]]:
    if answer is None:
        raise FileNotFound("after names no file of this tenant", param="after")
    return text(answer[0]), [file_record(text(file_id), fields) for file_id, fields in answer[1:]]


def delete_file(file_id: str, tenant: str | None = None, *, uploading: bool = False) -> Call[list[str]]:
    """Forget a file (or with `uploading` one on its way); gives the keys that the store may forget. Raises FileInUse
    while a batch reads it."""

    def parse(answer: list[bytes]) -> list[str]:
        if answer[0] == b"missing":
            raise FileNotFound(param="file_id")
        if answer[0] == b"busy":
            raise FileInUse(param="file_id")
        return [text(key) for key in answer[1:]]

    status = "uploading" if uploading else "processed"
    return Call("file_delete", (file_id, opt(tenant), uuid.uuid4().hex, status), parse)


def sweep_files(limit: int = 100) -> Call[tuple[int, list[str]]]:
    """Forget files whose time is over: how many, and the keys that the store may forget."""
    return Call("file_sweep", (limit,), lambda answer: (int(answer[0]), [text(key) for key in answer[1:]]))


def parts_of(shelf: str) -> Call[list[Part]]:
    """The parts of a shelf, in order."""

    return Call("", ("HGETALL", Key(f"parts:{shelf}")), read_parts)


def read_parts(answer: Any) -> list[Part]:
    by_number = {int(n): Part(**json.loads(part)) for n, part in as_fields(answer).items()}
    return [by_number[n] for n in sorted(by_number)]


def needed(keys: Sequence[str]) -> Call[list[bool]]:
    """Whether somebody still needs each of these objects of the store."""
    return Call("file_known", list(keys), lambda answer: [word == b"1" for word in answer])


def is_ours(key: str) -> bool:
    """Whether an object's key is one that jobs, uploads or batches write."""
    return OUR_KEYS.fullmatch(key) is not None
