"""/v1/files over HTTP and through the OpenAI SDK, on both stores: uploads, pages, contents, and what is refused."""

import hashlib
import os
import time

import httpx2
import openai
import psutil
import pytest
from fleet import until
from live_api import LiveApi, running_api

from inferfleet.tasks import files
from inferfleet.tasks.errors import OutputNotFound, StoreUnavailable
from inferfleet.tasks.stores import open_store
from inferfleet.tasks.stores.s3_store import AsyncS3Store

LINES = b'{"custom_id": "a"}\n' * 100


@pytest.fixture(scope="module", params=["redis", "s3"])
def api(request, session_redis):
    kept = request.getfixturevalue("session_swift").settings("files") if request.param == "s3" else {}
    with running_api(session_redis.url, max_file_bytes=10 << 20, **kept) as api:
        yield api


@pytest.fixture
def http(api):
    with api.http() as http:
        yield http


@pytest.fixture
def ledger(api):
    return api.worker.ledger


@pytest.fixture
def store(api, ledger):
    return open_store(api.settings, ledger)


def upload(http: httpx2.Client, data: bytes = LINES, headers=None, name="in.jsonl", **fields) -> httpx2.Response:
    return http.post(
        "/v1/files", files={"file": (name, data)}, data={"purpose": "batch"} | fields, headers=headers or {}
    )


def keys_of(ledger, file_id) -> list[str]:
    return [part.key for part in ledger.run(files.parts_of(file_id))]


def test_the_openai_sdk_uploads_lists_reads_and_deletes(api: LiveApi):
    client = api.sdk()
    # Given a file of several parts, as the SDK sends it
    data = os.urandom(9 << 20)
    made = client.files.create(
        file=("work.jsonl", data), purpose="batch", expires_after={"anchor": "created_at", "seconds": 7200}
    )
    # Then it is described as OpenAI does
    assert (made.object, made.bytes, made.filename, made.purpose) == ("file", len(data), "work.jsonl", "batch")
    assert made.id.startswith("file-")
    assert made.status == "processed"
    assert made.expires_at == made.created_at + 7200
    assert abs(made.created_at - time.time()) < 60
    # and it comes back as it went
    assert client.files.retrieve(made.id) == made
    assert client.files.content(made.id).read() == data
    assert made.id in [file.id for file in client.files.list(purpose="batch")]
    # until it is deleted
    assert client.files.delete(made.id).deleted
    for call in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError):
            call(made.id)
    assert made.id not in [file.id for file in client.files.list()]


def test_pages_follow_each_other_in_both_orders(api, http):
    client = api.sdk()
    made = [upload(http, LINES + bytes([number])).json()["id"] for number in range(5)]
    newest_first = [file.id for file in client.files.list(limit=2)]
    assert newest_first[:5] == made[::-1]
    oldest_first = [file.id for file in client.files.list(limit=2, order="asc")]
    assert oldest_first[-5:] == made
    page = http.get("/v1/files", params={"limit": 2}).json()
    assert (page["object"], page["has_more"]) == ("list", True)
    assert (page["first_id"], page["last_id"]) == (made[4], made[3])
    assert list(client.files.list(purpose="assistants")) == []


def test_a_deleted_file_leaves_nothing_in_the_store(http, ledger, store):
    file_id = upload(http).json()["id"]
    (part,) = ledger.run(files.parts_of(file_id))
    assert store.get(part.key, part.sha256) == LINES
    http.delete(f"/v1/files/{file_id}")
    with pytest.raises(OutputNotFound):
        store.get(part.key, part.sha256)
    assert [key for key in ledger.redis.keys(f"{ledger.prefix}*") if file_id.encode() in key] == [
        f"{ledger.prefix}gone:{file_id}".encode()
    ]


def test_files_whose_time_is_over_are_swept_with_their_parts(http, ledger):
    file_id = upload(http).json()["id"]
    (part,) = ledger.run(files.parts_of(file_id))
    assert ledger.run(files.sweep_files()) == (0, [])
    ledger.redis.zadd(f"{ledger.prefix}expiring", {file_id: 1})
    count, keys = ledger.run(files.sweep_files())
    assert (count, keys) == (1, [part.key])
    assert http.get(f"/v1/files/{file_id}").status_code == 404


def test_a_retry_of_the_sdk_and_a_repeated_key_make_no_second_file(http, ledger):
    tries = [upload(http, headers={"x-stainless-retry-count": str(count)}).json()["id"] for count in (0, 1)]
    assert tries[0] == tries[1]
    # another upload of the same bytes that is no retry is another file
    assert upload(http, headers={"x-stainless-retry-count": "0"}).json()["id"] != tries[0]
    # a key of the caller's own
    first, again = (upload(http, headers={"Idempotency-Key": "mine"}) for _ in range(2))
    assert first.json()["id"] == again.json()["id"]
    assert again.headers["idempotency-replayed"] == "true"
    other = upload(http, LINES + b"x", headers={"Idempotency-Key": "mine"})
    assert (other.status_code, other.json()["error"]["code"]) == (409, "idempotency_key_reuse")
    # and no parts of the uploads that were dropped are left
    assert len(keys_of(ledger, first.json()["id"])) == 1


def test_a_repeated_upload_is_answered_though_the_store_cannot_forget_its_parts_now(http, monkeypatch):
    first = upload(http, headers={"Idempotency-Key": "away"}).json()
    # Given a store that is away once the second upload has come, when its parts are to go, then that waits for later.
    monkeypatch.setattr(AsyncS3Store, "forget", unavailable)
    again = upload(http, headers={"Idempotency-Key": "away"})
    assert (again.status_code, again.json()["id"]) == (200, first["id"])


async def unavailable(*_) -> None:
    raise StoreUnavailable


def test_names_with_any_letters_come_back(http):
    file = upload(http, name="größe \u65e5\u672c.jsonl").json()
    assert file["filename"] == "größe \u65e5\u672c.jsonl"
    answer = http.get(f"/v1/files/{file['id']}/content")
    assert answer.content == LINES
    assert answer.headers["content-disposition"].startswith("attachment; filename*=UTF-8''gr%C3%B6")


def form(*parts: tuple[str, bytes]) -> dict:
    body = b"".join(b"--B\r\nContent-Disposition: form-data; " + head.encode() + b"\r\n\r\n" + data + b"\r\n"
                    for head, data in parts) + b"--B--\r\n"  # fmt: skip
    return {"content": body, "headers": {"content-type": "multipart/form-data; boundary=B"}}


FILE = ('name="file"; filename="a"', LINES)
PURPOSE = ('name="purpose"', b"batch")


@pytest.mark.parametrize(
    ("sent", "status", "param"),
    [
        (form(PURPOSE), 422, "file"),
        (form(FILE), 422, "purpose"),
        (form(FILE, ('name="purpose"', b"assistants")), 422, "purpose"),
        (form(FILE, FILE, PURPOSE), 422, "file"),
        (form(PURPOSE, ('name="file"', LINES)), 422, "file"),
        (form(PURPOSE, ('name="file"; filename="a"', b"")), 422, "file"),
        (form(PURPOSE, ('name="data"; filename="a"', LINES)), 422, "data"),
        (form(FILE, PURPOSE, PURPOSE), 422, "purpose"),
        (form(FILE, PURPOSE, ('name="color"', b"red")), 422, "color"),
        (form(FILE, PURPOSE, ('name="expires_after[anchor]"', b"created_at")), 422, "expires_after.seconds"),
        (form(FILE, PURPOSE, ('name="expires_after[anchor]"', b"created_at"), ('name="expires_after[seconds]"', b"5")),
         422, "expires_after.seconds"),
        (form(FILE, PURPOSE, ('name="expires_after"', b"soon")), 422, "expires_after"),
        ({"content": b"--B\r\nbroken", "headers": {"content-type": "multipart/form-data; boundary=B"}}, 422, None),
        ({"content": b"x", "headers": {"content-type": "multipart/form-data"}}, 422, "Content-Type"),
        ({"json": {"purpose": "batch"}}, 415, "Content-Type"),
        (form(PURPOSE, ('name="file"; filename="a"', bytes(11 << 20))), 413, None),
        (form(PURPOSE, ('name="file"; filename="a"', bytes((10 << 20) + 1))), 413, None),
    ],
    ids=range(17),
)  # fmt: skip
def test_bad_uploads_are_refused_by_field_and_leave_nothing(http, ledger, sent, status, param):
    def kept():
        return {key for key in ledger.redis.keys(f"{ledger.prefix}*") if b":gone:" not in key}

    before = kept()
    answer = http.post("/v1/files", **sent)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param)
    assert kept() == before


def test_bad_queries_and_ids_are_told(http):
    for params, param in (({"limit": 0}, "limit"), ({"ordr": "asc"}, "ordr"), ({"order": "up"}, "order")):
        answer = http.get("/v1/files", params=params)
        assert (answer.status_code, answer.json()["error"]["param"]) == (422, param)
    after = http.get("/v1/files", params={"after": "file-" + "0" * 32})
    assert (after.status_code, after.json()["error"]["param"]) == (404, "after")
    for path in ("file-1", "file-" + "0" * 32, "batch_" + "0" * 32):
        assert http.get(f"/v1/files/{path}").json()["error"]["code"] == "file_not_found"


def test_a_client_that_leaves_in_the_middle_leaves_nothing(http, ledger):
    body = form(FILE, PURPOSE)["content"]
    before = set(ledger.redis.keys(f"{ledger.prefix}*"))

    def half():
        yield body[:200] + bytes(5 << 20)
        raise OSError("the client's own trouble")

    with pytest.raises(OSError, match="trouble"):
        http.post("/v1/files", content=half(), headers={"content-type": "multipart/form-data; boundary=B"})
    until(lambda: {key for key in ledger.redis.keys(f"{ledger.prefix}*") if b":gone:" not in key} <= before, 10)


def test_an_upload_is_never_whole_in_memory(session_redis):
    # Given an API of its own process's memory and a file of 96 MiB, sent and read in pieces
    process, size = psutil.Process(), 96 << 20
    with running_api(session_redis.url, max_file_bytes=size) as api, api.http() as http:
        head, tail = form(PURPOSE, ('name="file"; filename="a"', b"|"))["content"].split(b"|")
        chunk = os.urandom(1 << 20)

        def body():
            yield head
            for _ in range(size >> 20):
                yield chunk
            yield tail

        before = process.memory_info().rss
        peak = 0
        made = http.post("/v1/files", content=body(), headers={"content-type": "multipart/form-data; boundary=B"})
        digest = hashlib.sha256()
        with http.stream("GET", f"/v1/files/{made.json()['id']}/content") as answer:
            for data in answer.iter_bytes():
                digest.update(data)
                peak = max(peak, process.memory_info().rss - before)
        # Then it came back whole, and never was in one piece
        assert digest.hexdigest() == hashlib.sha256(chunk * (size >> 20)).hexdigest()
        assert peak < 48 << 20
        http.delete(f"/v1/files/{made.json()['id']}")
