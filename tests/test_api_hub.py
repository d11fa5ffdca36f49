"""The hub: one reader for everybody who waits, believed only as far as the ledger confirms it."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import redis.asyncio

from inferfleet.tasks import names
from inferfleet.tasks.errors import JobNotFound, LedgerUnavailable
from inferfleet.tasks.ledger import AsyncLedger
from inferfleet.workers.api import hub as hub_module
from inferfleet.workers.api.hub import Hub
from inferfleet.workers.api.sse import cancel_and_wait

Scenario = Callable[[AsyncLedger, Hub], Awaitable[Any]]


@asynccontextmanager
async def hub_on(url: str, *, reading: bool = True) -> AsyncIterator[tuple[AsyncLedger, Hub]]:
    ledger = AsyncLedger.from_url(url, "test")
    reader = redis.asyncio.Redis.from_url(url)
    hub = Hub(ledger, reader)
    task = asyncio.create_task(hub.run()) if reading else None
    try:
        yield ledger, hub
    finally:
        if task is not None:
            await cancel_and_wait(task)
        await reader.aclose()
        await ledger.close()


@pytest.fixture
def play(redis_url: str) -> Callable[..., Any]:
    """play(scenario) runs `async def scenario(ledger, hub)` with a reading hub."""

    def run(scenario: Scenario, **options: Any) -> Any:
        async def whole() -> Any:
            async with asyncio.timeout(30), hub_on(redis_url, **options) as (ledger, hub):
                return await scenario(ledger, hub)

        return asyncio.run(whole())

    return run


async def running(ledger: AsyncLedger) -> tuple[str, int]:
    """A job that somebody carries: id and fence."""
    job_id = names.new_job_id()
    await ledger.submit(job_id, b"{}", model="m", tenant="t", body_hash="h")
    claim = await ledger.claim("m", worker="w", token=job_id)
    assert claim is not None
    return claim.job_id, claim.fence


async def publish(ledger: AsyncLedger, job: tuple[str, int], *numbers: int) -> None:
    events = [{"type": names.DELTA, "index": 0, "delta": str(number)} for number in numbers]
    await ledger.publish(*job, events, f"t{numbers[0]}")


async def numbers_of(events: AsyncIterator[list[dict[str, Any]]]) -> list[int]:
    return [event["sequence_number"] async for batch in events for event in batch]


def test_followers_from_different_places_each_see_all_that_follows_once(play):
    async def scenario(ledger: AsyncLedger, hub: Hub) -> list[list[int]]:
        job = await running(ledger)
        early = asyncio.create_task(numbers_of(hub.follow(job[0], "t")))
        for number in range(20):
            await publish(ledger, job, number)
        late = asyncio.create_task(numbers_of(hub.follow(job[0], "t", after=10)))
        for number in range(20, 40):
            await publish(ledger, job, number)
        await ledger.complete(*job, state="completed", response=b"{}")
        return [await early, await late]

    assert play(scenario) == [list(range(43)), list(range(11, 43))]


def test_a_follower_that_does_not_keep_up_loses_nothing(play, monkeypatch):
    # Given a buffer of ten entries and a reader that sleeps while hundreds come,
    monkeypatch.setattr(hub_module, "MAX_BUFFER", 10)

    async def scenario(ledger: AsyncLedger, hub: Hub) -> list[int]:
        job = await running(ledger)
        seen: list[int] = []
        follower = hub.follow(job[0], "t")
        seen += [event["sequence_number"] for event in await anext(follower)]
        second = asyncio.create_task(anext(follower))
        await publish(ledger, job, 0)
        seen += [event["sequence_number"] for event in await second]
        for start in range(1, 400, 10):
            await publish(ledger, job, *range(start, start + 10))
        await ledger.complete(*job, state="completed", response=b"{}")
        return seen + await numbers_of(follower)

    assert play(scenario) == list(range(2 + 401 + 1))


def test_without_the_hubs_reading_everybody_still_hears_the_end(play, monkeypatch):
    # Given a hub that delivers nothing, when a job ends, then followers and waiters find it in the ledger themselves.
    monkeypatch.setattr(hub_module, "TICK_SECONDS", 0.05)

    async def scenario(ledger: AsyncLedger, hub: Hub) -> tuple[list[int], str]:
        job = await running(ledger)
        following = asyncio.create_task(numbers_of(hub.follow(job[0], "t")))
        waiting = asyncio.create_task(hub.until_ended(job[0], "t"))
        await publish(ledger, job, 0, 1)
        await ledger.complete(*job, state="completed", response=b"{}")
        return await following, (await waiting).state

    assert play(scenario, reading=False) == ([0, 1, 2, 3, 4], "completed")


def test_a_thousand_waiters_hear_their_ends_through_one_read(play):
    async def scenario(ledger: AsyncLedger, hub: Hub) -> tuple[int, int]:
        jobs = [await running(ledger) for _ in range(1000)]
        gate = asyncio.Semaphore(50)  # so many connections at once, as the API's own pool bounds them

        async def wait(job_id: str) -> str:
            return (await hub.until_ended(job_id, "t")).state

        async def end(job: tuple[str, int]) -> None:
            async with gate:
                await ledger.complete(*job, state="completed", response=b"{}")

        waiters = [asyncio.create_task(wait(job_id)) for job_id, _ in jobs]
        await asyncio.gather(*(end(job) for job in jobs))
        states = await asyncio.gather(*waiters)
        return states.count("completed"), len(hub._waiting)

    assert play(scenario) == (1000, 0)


def test_a_retried_job_is_followed_to_its_second_end(play):
    async def scenario(ledger: AsyncLedger, hub: Hub) -> list[str]:
        job_id, fence = await running(ledger)
        await ledger.complete(job_id, fence, state="failed", error={"code": "engine_error", "message": "", "type": ""})
        await ledger.retry(job_id, "t")
        following = asyncio.create_task(collect(hub.follow(job_id, "t")))
        claim = await ledger.claim("m", worker="w", token="again")
        assert claim is not None
        await ledger.complete(job_id, claim.fence, state="completed", response=b"{}")
        return [event["type"] for event in await following]

    async def collect(events: AsyncIterator[list[dict[str, Any]]]) -> list[dict[str, Any]]:
        return [event async for batch in events for event in batch]

    assert play(scenario) == ["job.queued", "job.in_progress", "job.completed"]


def test_an_unknown_job_and_another_tenants_job_are_not_found(play):
    async def scenario(ledger: AsyncLedger, hub: Hub) -> None:
        job_id, _ = await running(ledger)
        for wanted, tenant in ((names.new_job_id(), "t"), (job_id, "stranger")):
            with pytest.raises(JobNotFound):
                await anext(hub.follow(wanted, tenant))
            with pytest.raises(JobNotFound):
                await hub.until_ended(wanted, tenant)

    play(scenario)


def test_a_job_that_is_deleted_ends_its_followers_with_not_found(play, monkeypatch):
    monkeypatch.setattr(hub_module, "TICK_SECONDS", 0.05)

    async def scenario(ledger: AsyncLedger, hub: Hub) -> None:
        job_id, _ = await running(ledger)
        following = asyncio.create_task(numbers_of(hub.follow(job_id, "t")))
        await asyncio.sleep(0.1)
        await ledger.redis.delete(f"{ledger.prefix}job:{job_id}", f"{ledger.prefix}events:{job_id}")
        with pytest.raises(JobNotFound):
            await following

    play(scenario)


def test_waiters_are_told_when_redis_stays_away(own_redis, monkeypatch):
    monkeypatch.setattr(hub_module, "TICK_SECONDS", 0.05)
    monkeypatch.setattr(hub_module, "OUTAGE_SECONDS", 0.1)

    async def scenario() -> None:
        async with asyncio.timeout(60), hub_on(own_redis.url) as (ledger, hub):
            job_id, _ = await running(ledger)
            waiting = asyncio.create_task(hub.until_ended(job_id, "t"))
            await asyncio.sleep(0.1)
            own_redis.kill()
            with pytest.raises(LedgerUnavailable):
                await waiting

    asyncio.run(scenario())


def test_nothing_is_kept_of_those_who_left(play):
    async def scenario(ledger: AsyncLedger, hub: Hub) -> tuple[int, int]:
        job_id, _ = await running(ledger)
        follower = hub.follow(job_id, "t")
        await anext(follower)
        pending = asyncio.create_task(anext(follower))
        waiting = asyncio.create_task(hub.until_ended(job_id, "t"))
        await asyncio.sleep(0.05)
        await cancel_and_wait(pending, waiting)
        await follower.aclose()
        return len(hub._streams), len(hub._waiting)

    assert play(scenario) == (0, 0)


def test_an_event_body_reaches_its_reader_unchanged(play):
    text = 'quotes " and \\ and \n lines, ünïcode, 🙂, null'

    async def scenario(ledger: AsyncLedger, hub: Hub) -> Any:
        job = await running(ledger)
        follower = hub.follow(job[0], "t")
        await anext(follower)
        second = asyncio.create_task(anext(follower))
        await ledger.publish(*job, [{"type": names.DELTA, "index": 0, "delta": text}], "t")
        return (await second)[0]

    event = play(scenario)
    assert json.loads(json.dumps(event)) == {"sequence_number": 2, "type": names.DELTA, "index": 0, "delta": text}
