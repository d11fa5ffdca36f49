"""An image job inside a worker: what of an engine's words reaches the log, when it is done, and who shares a worker."""

import base64
import hashlib
import threading

import pytest
from fake_pictures import picture
from fleet import until
from memory_store import MemoryStore

from inferfleet.tasks import names
from inferfleet.tasks.errors import OutputDamaged, OutputNotFound
from inferfleet.workers import image_flight
from inferfleet.workers.flight import Ending
from inferfleet.workers.heart import Heart
from inferfleet.workers.image_flight import ImageFlight
from inferfleet.workers.outputs import OutputWriter
from inferfleet.workers.publisher import Publisher
from inferfleet.workers.seats import Seats

JOB = "job_" + "7" * 32
USAGE = {"input_tokens": 3, "output_tokens": 16}


def progress(step, steps=8):
    return {"kind": "progress", "id": "x", "step": step, "steps": steps}


def preview(index, step, data="aaaa"):
    return {"kind": "preview", "id": "x", "index": index, "step": step, "content_type": "image/jpeg", "b64_json": data}


def finished(index, data=b"picture", seed=5):
    return {"kind": "picture", "id": "x", "index": index, "seed": seed, "width": 64, "height": 32,
            "content_type": "image/png", "b64_json": base64.b64encode(data).decode()}  # fmt: skip


def flight(deliver=lambda flight, picture: None, *, n=1, max_bytes=1 << 20):
    return ImageFlight(JOB, 3, "p", num_pictures=n, max_bytes=max_bytes, deliver=deliver)


def test_between_two_flushes_only_the_latest_progress_and_the_latest_preview_of_each_picture_count():
    flying = flight(n=2)
    words = [progress(1), preview(0, 1), preview(1, 1), progress(2), preview(0, 2), progress(3)]
    urgent = [flying.absorb(word) for word in words]
    assert urgent == [True] + 5 * [False]
    told = [(event["type"], event.get("index"), event["step"]) for event in flying.outgoing().events]
    assert sorted(told, key=str) == [
        ("job.preview", 0, 2), ("job.preview", 1, 1), ("job.progress", None, 3)
    ]  # fmt: skip


def test_previews_of_one_run_are_bounded_and_the_rest_goes_on(monkeypatch):
    monkeypatch.setattr(image_flight, "MAX_PREVIEW_CHARS", 10)
    flying = flight()
    for step in range(1, 5):
        flying.absorb(preview(0, step, "aaaa"))
        flying.absorb(progress(step))
    events = flying.outgoing().events
    assert [event["step"] for event in events if event["type"] == names.PREVIEW] == [2]
    assert [event["step"] for event in events if event["type"] == names.PROGRESS] == [4]


def test_a_flight_is_settled_when_its_pictures_are_stored_and_told():
    delivered = []
    flying = flight(lambda flight, picture: delivered.append(picture), n=2)
    flying.absorb(finished(0))
    flying.absorb(finished(1, b"other", seed=6))
    flying.finish(USAGE)
    assert not flying.has_news and not flying.settled
    # when the second is stored first
    for number, stored in enumerate(reversed(delivered)):
        assert flying.stored(stored)
        assert not flying.settled
        assert len(flying.outgoing().events) == 1
        flying.published()
        assert flying.settled == (number == 1)
    assert [output["index"] for output in flying.outputs] == [0, 1]
    assert flying.outputs[1] == {
        "id": f"out_{'7' * 32}_3_1", "index": 1, "content_type": "image/png", "size_bytes": 5, "width": 64,
        "height": 32, "seed": 6, "hash": "sha256:" + hashlib.sha256(b"other").hexdigest(),
    }  # fmt: skip


def test_a_picture_that_is_told_twice_is_stored_once():
    delivered = []
    flying = flight(lambda flight, picture: delivered.append(picture))
    flying.absorb(finished(0))
    flying.absorb(finished(0))
    assert len(delivered) == 1


def test_a_cancelled_flight_waits_for_no_store():
    flying = flight()
    flying.absorb(finished(0))
    flying.finish(USAGE)
    flying.cancelled = True
    assert flying.settled


def test_pictures_that_are_too_large_together_fail_the_job_with_the_limit():
    delivered = []
    flying = flight(lambda flight, picture: delivered.append(picture), n=2, max_bytes=10)
    flying.absorb(finished(0, b"12345678"))
    assert flying.ending is None
    flying.absorb(finished(1, b"123"))
    assert flying.ending is Ending.FAILED
    assert (flying.error["code"], "10 bytes" in flying.error["message"]) == ("result_too_large", True)
    assert len(delivered) == 1


# The writer ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def writing():
    """(store, writer): flights are published to nowhere."""
    store = MemoryStore()
    publisher = Publisher(lambda batch: ["ok"] * len(batch), cancel=lambda flight: None)
    writer = OutputWriter(store, publisher)
    yield store, writer
    writer.stop()
    publisher.stop()


@pytest.mark.parametrize("keeps", [False, True])
def test_a_store_that_fails_or_whose_answers_are_lost_is_asked_until_it_answers(writing, keeps):
    store, writer = writing
    store.failures, store.keeps = 3, keeps
    flying = flight(writer.deliver)
    flying.absorb(finished(0))
    flying.finish(USAGE)
    assert flying.ended.wait(10) and flying.ending is Ending.FINISHED
    assert store.num_puts == 4
    assert store.files == {flying.keys[0]: b"picture"}


def test_a_flight_that_ended_while_the_store_was_away_leaves_nothing_there(writing):
    store, writer = writing
    store.failures = 1 << 30
    flying = flight(writer.deliver)
    flying.absorb(finished(0))
    until(lambda: store.num_puts > 1)
    flying.end(Ending.STALE)
    store.failures = 0
    # then the writer is free for others, and nothing of the stale one stays
    other = ImageFlight("job_" + "8" * 32, 1, "p", num_pictures=1, max_bytes=100, deliver=writer.deliver)
    other.absorb(finished(0, b"mine"))
    other.finish(USAGE)
    assert other.ended.wait(10)
    assert store.files == {other.keys[0]: b"mine"}
    assert flying.outputs == []


def test_a_store_that_damages_a_picture_fails_its_job_and_no_other(writing, monkeypatch):
    store, writer = writing
    put = store.put

    def damage(key, data, content_type):
        if data == b"bad":
            raise OutputDamaged()
        return put(key, data, content_type)

    monkeypatch.setattr(store, "put", damage)
    flights = [flight(writer.deliver), flight(writer.deliver)]
    for flying, data in zip(flights, (b"bad", b"good"), strict=True):
        flying.absorb(finished(0, data))
        flying.finish(USAGE)
    assert all(flying.ended.wait(10) for flying in flights)
    assert [flying.ending for flying in flights] == [Ending.FAILED, Ending.FINISHED]
    assert flights[0].error["code"] == "output_damaged"


def test_what_a_flight_stored_can_be_taken_back(writing):
    store, writer = writing
    flying = flight(writer.deliver, n=2)
    flying.absorb(finished(0))
    until(lambda: flying.keys)
    writer.discard(flying)
    with pytest.raises(OutputNotFound):
        store.get(f"out_{'7' * 32}_3_0", "")


def test_a_writer_stops_though_its_store_is_away():
    store = MemoryStore()
    store.failures = 1 << 30
    publisher = Publisher(lambda batch: ["ok"] * len(batch), cancel=lambda flight: None)
    writer = OutputWriter(store, publisher)
    flight(writer.deliver).absorb(finished(0))
    until(lambda: store.num_puts)
    stopper = threading.Thread(target=writer.stop)
    stopper.start()
    stopper.join(10)
    assert not stopper.is_alive()
    publisher.stop()


# The heart -----------------------------------------------------------------------------------------------------------


class Standing:
    """A resident whose engine does nothing."""

    model = "p"

    def __init__(self, *flights):
        self._flights = flights

    def still_for(self):
        return 0.0

    def take_moved(self):
        return False

    def flights(self):
        return list(self._flights)


class BeatBook:
    """A ledger that notes whose leases are renewed."""

    def __init__(self):
        self.beaten = []

    def beat(self, worker, jobs, lease_ms):
        self.beaten.append([job_id for job_id, _ in jobs])
        return {job_id: "ok" for job_id, _ in jobs}


def test_leases_of_what_this_worker_prepares_or_stores_are_renewed_though_the_engine_stands_still():
    flights = [ImageFlight(f"job_{i}", 1, "p", num_pictures=1, max_bytes=9, deliver=print) for i in range(3)]
    flights[0].preparing = True
    flights[2].finish(USAGE)
    book = BeatBook()
    heart = Heart(book, "w", lambda: [Standing(*flights)], heartbeat_seconds=0.01, lease_seconds=9, stall_seconds=9)
    heart.start()
    until(lambda: len(book.beaten) > 1)
    heart.stop()
    assert book.beaten[0] == ["job_0", "job_2"]


# Seats ---------------------------------------------------------------------------------------------------------------


class Model:
    """What seats ask of a resident."""

    def __init__(self, model, kind, batch_size):
        self.model, self.kind, self.batch_size = model, kind, batch_size


def fill(seats, model, at_most=100):
    taken = 0
    while taken < at_most and seats.take(model):
        taken += 1
    return taken


def test_neither_of_two_models_can_take_the_share_of_the_other():
    chat, image = Model("c", "text", 32), Model("p", "image", 8)
    for first, second, limits in ((chat, image, (56, 8)), (image, chat, (16, 48))):
        seats = Seats(64, [chat, image])
        assert (fill(seats, first), limits[0]) == (limits[0], limits[0])
        # the other still finds at least what its engine runs at once
        assert min(fill(seats, second), 64 - limits[0]) == limits[1]


@pytest.mark.parametrize(
    ("slots", "models", "limits"),
    [
        (64, [("text", 32)], [64]),
        (64, [("text", 4)], [64]),
        (64, [("image", 8)], [16]),
        (4, [("image", 8)], [4]),
        (64, [("text", 32), ("image", 8)], [56, 16]),
        (8, [("text", 32), ("image", 8)], [4, 4]),
        (2, [("text", 32), ("image", 8), ("text", 1)], [1, 1, 1]),
        (64, [("text", 64), ("text", 64)], [32, 32]),
    ],
)
def test_a_model_s_limit_leaves_the_others_their_share(slots, models, limits):
    residents = [Model(str(number), *facts) for number, facts in enumerate(models)]
    seats = Seats(slots, residents)
    assert [seats.limit(resident) for resident in residents] == limits


def test_a_model_alone_in_its_worker_is_bounded_by_the_threads_alone():
    chat = Model("c", "text", 4)
    assert fill(Seats(16, [chat]), chat) == 100
    image = Model("p", "image", 4)
    assert fill(Seats(16, [image]), image) == 8


def test_pictures_count_until_their_job_has_left():
    image = Model("p", "image", 4)
    seats = Seats(64, [image])
    assert seats.take(image)
    seats.weigh(image, 7)
    assert not seats.has_room(image) and not seats.take(image)
    seats.weigh(image, -7)
    assert seats.take(image)
    seats.leave(image)
    seats.leave(image)
    assert fill(seats, image) == 8


def test_the_scripted_pictures_of_two_seeds_differ():
    assert picture(1) == picture(1) != picture(2) != picture(2, init_image=b"x")
