"""One upload on its way: the form's file goes to the store part by part, so that no more than one is ever held."""

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress

from fastapi import Request
from starlette.requests import ClientDisconnect

from inferfleet.tasks import files, strict_json
from inferfleet.tasks.contracts import validated
from inferfleet.tasks.contracts.batches import FileFields
from inferfleet.tasks.errors import (
    BodyTooLarge,
    FleetError,
    InvalidRequest,
    LedgerUnavailable,
    StoreUnavailable,
    UnsupportedMediaType,
)
from inferfleet.tasks.files import Closed
from inferfleet.workers.api.body import media_type
from inferfleet.workers.api.multipart import Part, read_form
from inferfleet.workers.api.prefer import read_idempotency_key, read_retry_count
from inferfleet.workers.api.services import Services

#: Of a form beside its file.
FORM_BYTES = 1 << 20
MAX_FILENAME = 512
FORM = "multipart/form-data"
CONTENT_TYPE = "application/jsonl"


class Upload:
    """Receives one file. What was stored is forgotten again if the upload fails."""

    def __init__(self, use: Services, tenant: str) -> None:
        self._use = use
        self._tenant = tenant
        self._limit = use.settings.max_file_bytes
        self._id = files.new_file_id()
        self._opened = False
        self._num_parts = 0
        self._size = 0
        self._digest = hashlib.sha256()

    async def receive(self, request: Request) -> Closed:
        """The file, whole and listed. Raises UnsupportedMediaType, BodyTooLarge, InvalidRequest, StoreUnavailable."""
        if media_type(request) != FORM:
            raise UnsupportedMediaType(f"Content-Type must be {FORM}", param="Content-Type")
        read_idempotency_key(request.headers)
        try:
            parts = await read_form(request, self._limit + FORM_BYTES, self._drain)
            fields = self._fields(parts)
            file = _the_file(parts)
            await self._put(file, bytes(file.data))
            return await self._close(request, file, fields)
        except files.ReusedForFile as error:
            await forget(self._use, error.dropped)
            raise
        except (FleetError, ClientDisconnect):
            await self._give_up()
            raise

    async def _drain(self, parts: Sequence[Part]) -> None:
        """After each chunk of the body: store what has come together."""
        for part in parts:
            while part.is_file and len(part.data) >= files.PART_BYTES:
                data = bytes(part.data[: files.PART_BYTES])
                del part.data[: files.PART_BYTES]
                await self._put(part, data)

    async def _put(self, file: Part, data: bytes) -> None:
        self._size += len(data)
        if self._size > self._limit:
            raise BodyTooLarge(f"the file is larger than the limit of {self._limit} bytes (max_file_bytes)")
        if not data:
            return
        self._digest.update(data)
        if not self._opened:
            name = file.filename[-MAX_FILENAME:] or "file"
            await self._use.ledger.run(files.open_file(self._id, self._tenant, name, "batch"))
            self._opened = True
        key = files.part_key(self._id, 0, self._num_parts)
        stored = await self._use.store.put(key, data, CONTENT_TYPE)
        part = files.Part(key, stored.size_bytes, stored.sha256)
        await self._use.ledger.run(files.add_part(self._id, self._num_parts, part, in_ledger=self._use.store.in_ledger))
        self._num_parts += 1

    def _fields(self, parts: Sequence[Part]) -> FileFields:
        """The other fields of the form. Raises InvalidRequest, naming one."""
        values: dict[str, object] = {}
        for part in parts:
            if part.is_file:
                continue
            name, found, key = part.name.partition("[")
            place = values.setdefault(name, {}) if found else values
            key = key.removesuffix("]") if found else name
            if not isinstance(place, dict) or key in place:
                raise InvalidRequest(f"{part.name} is given twice", param=part.name)
            number = key == "seconds" and part.text.isascii() and part.text.isdecimal() and len(part.text) < 10
            place[key] = int(part.text) if number else part.text
        return validated(FileFields, strict_json.loads(json.dumps(values).encode()))

    async def _close(self, request: Request, file: Part, fields: FileFields) -> Closed:
        if not self._size:
            raise InvalidRequest("the file is empty", param="file")
        seconds = fields.expires_after.seconds if fields.expires_after else files.DEFAULT_SECONDS
        named = f"{file.filename}\n{fields.purpose}\n{seconds}\n{self._digest.hexdigest()}"
        body_hash = hashlib.sha256(named.encode()).hexdigest()
        key, tries = read_idempotency_key(request.headers), read_retry_count(request.headers)
        idempotency = None
        if key is not None:
            idempotency = (files.file_digest(self._tenant, key), True, True)
        elif tries is not None:  # the SDK counts its tries; only a second one looks for the first
            idempotency = (files.file_digest(self._tenant, f"sdk:{body_hash}"), tries > 0, False)
        closed = await self._use.ledger.run(
            files.close_file(self._id, self._size, seconds, body_hash=body_hash, idempotency=idempotency)
        )
        await forget(self._use, closed.dropped)
        return closed

    async def _give_up(self) -> None:
        """Forget what came. If that fails too, the sweep of unfinished uploads does it later."""
        if not self._opened:
            return
        try:
            dropped = await self._use.ledger.run(files.delete_file(self._id, self._tenant, uploading=True))
            await forget(self._use, dropped)
        except FleetError:
            return


async def forget(use: Services, keys: Sequence[str]) -> None:
    """Let the store forget parts that nobody needs. What it does not hear of now, its janitor finds later."""
    with suppress(LedgerUnavailable, StoreUnavailable):
        if keys and not use.store.in_ledger:
            await use.store.forget(keys)


def _the_file(parts: Sequence[Part]) -> Part:
    """The one file of the form. Raises InvalidRequest."""
    found = [part for part in parts if part.is_file]
    for part in found:
        if part.name != "file":
            raise InvalidRequest(f"{part.name} is no file: only file is", param=part.name)
    if len(found) != 1:
        problem = "is missing: a file of the form, with a file name" if not found else "is given twice"
        raise InvalidRequest(f"file {problem}", param="file")
    return found[0]
