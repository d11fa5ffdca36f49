"""The store in a bucket, against a real server: links, listings, and what it does when the server or the wire fail."""

import hashlib
import signal
import threading
import time

import httpx2
import pytest
from chaosproxy import ChaosProxy
from swift_s3 import SwiftServer

from inferfleet.tasks.errors import (
    OutputDamaged,
    OutputNotFound,
    SettingsError,
    StoreMisconfigured,
    StoreUnavailable,
)
from inferfleet.tasks.settings import S3Settings, Settings, load_settings
from inferfleet.tasks.stores import open_store
from inferfleet.tasks.stores.s3_store import S3Store, checksums, make_client

PICTURE = bytes(range(256)) * 512
DIGEST = hashlib.sha256(PICTURE).hexdigest()


def store_of(settings: dict, **s3) -> S3Store:
    return open_store(Settings(**settings | {"s3": settings["s3"] | s3}), None)


@pytest.fixture
def store(s3):
    return store_of(s3)


@pytest.fixture
def wire(session_swift):
    """A way to the server that damages what passes."""
    with ChaosProxy(session_swift.port) as proxy:
        yield proxy


def through(wire: ChaosProxy, s3: dict, **more) -> S3Store:
    return store_of(s3, endpoint_url=f"http://127.0.0.1:{wire.port}", **more)


def link(store: S3Store, key: str, seconds: int = 60) -> str:
    url = store.presign(key, content_type="image/png", filename="picture.png", seconds=seconds)
    assert url is not None
    return url


# Links and listings --------------------------------------------------------------------------------------------------


def test_a_link_gives_the_file_without_a_key_with_our_type_and_as_an_attachment(store):
    # Given a file whose maker claims that it is a page
    store.put("out_1", PICTURE, "text/html")
    # When somebody follows the link
    answer = httpx2.get(link(store, "out_1"), trust_env=False)
    # Then it is a picture to be saved
    assert (answer.status_code, answer.content) == (200, PICTURE)
    assert answer.headers["content-type"] == "image/png"
    assert answer.headers["content-disposition"] == 'attachment; filename="picture.png"'


def test_a_link_to_another_file_or_of_another_type_or_out_of_its_time_is_refused(store):
    for key in ("out_1", "out_2"):
        store.put(key, PICTURE, "image/png")
    good, short = link(store, "out_1"), link(store, "out_1", seconds=1)
    for forged in (good.replace("out_1", "out_2"), good.replace("image%2Fpng", "text%2Fhtml")):
        assert httpx2.get(forged, trust_env=False).status_code == 403
    time.sleep(2.1)
    assert httpx2.get(short, trust_env=False).status_code == 403
    assert httpx2.get(good, trust_env=False).status_code == 200


def test_a_listing_goes_through_all_files_of_the_prefix_in_order_and_no_others(s3, store):
    for number in (3, 1, 2):
        store.put(f"out_{number}", PICTURE, "image/png")
    other = store_of(s3 | {"result_store": s3["result_store"] + "-other"})
    other.put("out_0", PICTURE, "image/png")

    first = store.scan(limit=2)

    assert [found.key for found in first] == ["out_1", "out_2"]
    assert first[0].size_bytes == len(PICTURE)
    assert abs(first[0].modified.timestamp() - time.time()) < 60
    assert [found.key for found in store.scan(after="out_2", limit=2)] == ["out_3"]
    assert store.scan(after="out_3") == []


# Faults --------------------------------------------------------------------------------------------------------------


def test_a_file_that_the_wire_damages_on_its_way_in_is_sent_again(wire, s3, store):
    wire.faults.spoil_requests = 1
    through(wire, s3).put("out_1", PICTURE, "image/png")
    assert wire.faults.spoil_requests == 0
    assert store.get("out_1", DIGEST) == PICTURE


def test_a_file_that_the_wire_damages_on_its_way_out_is_asked_for_again(wire, s3, store):
    store.put("out_1", PICTURE, "image/png")
    wire.faults.spoil_replies = 2
    assert through(wire, s3).get("out_1", DIGEST) == PICTURE
    assert wire.faults.spoil_replies == 0


def test_a_file_that_is_damaged_in_the_bucket_is_told_and_never_given(store):
    store.put("out_1", PICTURE[:-1] + b"?", "image/png")
    with pytest.raises(OutputDamaged):
        store.get("out_1", DIGEST)


def test_lost_replies_cost_another_try_and_nothing_else(wire, s3):
    store = through(wire, s3)
    wire.lose_next_reply(2)
    store.put("out_1", PICTURE, "image/png")
    wire.lose_next_reply()
    assert store.get("out_1", DIGEST) == PICTURE
    wire.lose_next_reply()
    store.forget(["out_1"])
    assert wire.lost == 4
    with pytest.raises(OutputNotFound):
        store.get("out_1", DIGEST)


def test_a_server_that_is_away_for_a_while_is_waited_for(own_swift, s3):
    # Given a server whose disk process is dead, so that its front answers 503
    store = store_of(own_swift.settings("a"), deadline_seconds=20)
    own_swift.kill("object")
    mended = threading.Timer(1.5, own_swift.start, ["object"])
    mended.start()
    # When a file is written meanwhile
    started = time.monotonic()
    store.put("out_1", PICTURE, "image/png")
    # Then the write ends after the server is back
    assert time.monotonic() - started > 1
    mended.join()
    assert store.get("out_1", DIGEST) == PICTURE


def test_a_call_ends_when_its_time_is_over_whatever_the_server_does(own_swift):
    store = store_of(own_swift.settings("a"), deadline_seconds=1, read_timeout_seconds=1)
    own_swift.signal("proxy", signal.SIGSTOP)
    started = time.monotonic()
    with pytest.raises(StoreUnavailable, match="does not answer"):
        store.put("out_1", PICTURE, "image/png")
    own_swift.kill("proxy")
    with pytest.raises(StoreUnavailable, match="does not answer"):
        store.get("out_1", DIGEST)
    assert time.monotonic() - started < 6


@pytest.fixture
def own_swift(session_swift, tmp_path):
    """A server of the test's own, for those that stop parts of it."""
    with SwiftServer(session_swift.python, tmp_path / "swift") as server:
        yield server


@pytest.mark.parametrize(
    "change",
    [{"secret_access_key": "wrong"}, {"access_key_id": "nobody:x"}, {"bucket": "no-such-bucket"}],
    ids=lambda change: next(iter(change)),
)
def test_wrong_keys_and_buckets_are_told_at_once_and_not_tried_again(s3, change):
    bucket = change.pop("bucket", None)
    settings = s3 | ({"result_store": f"s3://{bucket}"} if bucket else {})
    store = store_of(settings, **change)
    started = time.monotonic()
    for call in (store.check, lambda: store.put("a", b"1", "text/plain"), lambda: store.get("a", DIGEST)):
        with pytest.raises(StoreMisconfigured, match="refuses"):
            call()
    assert time.monotonic() - started < 2


def test_a_bucket_that_can_be_used_passes_the_check(store):
    store.check()


# Settings ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["sha256", "md5", "none"])
def test_every_checksum_mode_writes(s3, mode):
    store = store_of(s3, checksums=mode)
    store.put("out_1", PICTURE, "image/png")
    assert store.get("out_1", DIGEST) == PICTURE


@pytest.mark.parametrize("mode", ["sha256", "md5"])
def test_the_server_refuses_a_file_that_its_checksum_does_not_fit(s3, mode):
    client = make_client(S3Settings(**s3["s3"]))
    with pytest.raises(client.exceptions.ClientError, match="BadDigest"):
        client.put_object(Bucket="results", Key="x", Body=b"one", **checksums(mode, b"two"))


def test_addressing_styles_put_the_bucket_into_the_path_or_the_host(s3):
    urls = {style: link(store_of(s3, addressing_style=style, endpoint_url="https://s3.example"), "k")
            for style in ("path", "virtual")}  # fmt: skip
    assert urls["path"].startswith("https://s3.example/results/test-")
    assert urls["virtual"].startswith("https://results.s3.example/test-")


@pytest.mark.parametrize(
    ("settings", "param"),
    [
        ({"result_store": "gs://bucket"}, "result_store"),
        ({"result_store": "s3://"}, "result_store"),
        ({"result_store": "s3://UPPER"}, "result_store"),
        ({"s3": {"endpoint_url": "ftp://host"}}, "s3.endpoint_url"),
        ({"s3": {"addressing_style": "dns"}}, "s3.addressing_style"),
        ({"s3": {"read_timeout_seconds": 0}}, "s3.read_timeout_seconds"),
        ({"s3": {"acces_key_id": "x"}}, "s3.acces_key_id"),
        ({"s3": {"access_key_id": "x"}}, "s3"),
    ],
)
def test_bad_settings_of_the_store_stop_the_start_by_name(settings, param):
    with pytest.raises(SettingsError) as caught:
        load_settings(settings)
    assert caught.value.param == param


def test_a_secret_of_the_store_is_never_shown(s3):
    assert "lab-secret-key" not in repr(Settings(**s3)) + Settings(**s3).model_dump_json()
