"""One soak: start the fleet, load it while things go wrong, let it come to rest, look at what is left."""

import random
import time
from collections import Counter
from contextlib import ExitStack, closing
from dataclasses import dataclass, field

import httpx2
import invariants
import openai
from live_batches import read_lines
from outbox_moves import pass_time
from receivers import Receiver, answer, drip, reset, silence

from inferfleet.tasks.batches import TERMINAL as BATCH_ENDS
from inferfleet.tasks.webhooks import new_secret
from soak.faults import Chaos
from soak.load import Load
from soak.parts import WORKERS, Parts

START_SECONDS, REST_SECONDS = 60, 60
ENDPOINT_EVENTS = ("job.completed", "job.failed", "job.cancelled")
DAY = 86_400


@dataclass
class Verdict:
    """What was done, and what is wrong: nothing, if all is well."""

    seed: int
    wrong: list[str] = field(default_factory=list)
    faults: Counter = field(default_factory=Counter)
    figures: dict = field(default_factory=dict)

    def __str__(self) -> str:
        said = [f"seed {self.seed}: {'WRONG' if self.wrong else 'all is well'}"]
        said += [f"  {name}: {value}" for name, value in self.figures.items()]
        said.append("  faults: " + ", ".join(f"{name} {count}" for name, count in sorted(self.faults.items())))
        return "\n".join([*said, *(f"  ! {text}" for text in self.wrong)])


class Mood:
    """A receiver that answers as it likes, until it calms down."""

    def __init__(self, seed) -> None:
        self._chosen = random.Random(f"{seed}.mood")
        self.calm = False

    def __call__(self, connection) -> None:
        deeds = [answer(200)] * 5 + [answer(500), answer(429, "retry-after: 1\r\n"), reset, silence, drip]
        (answer(200) if self.calm else self._chosen.choice(deeds))(connection)


class Soak:
    """One run in a folder of its own."""

    def __init__(self, seed, seconds, redis_binary, swift, folder, say=print) -> None:
        self.seed, self.seconds, self.say = seed, seconds, say
        self._given = (redis_binary, swift, folder)
        self.verdict = Verdict(seed)

    def run(self) -> Verdict:
        with ExitStack() as stack:
            self.mood = Mood(self.seed)
            self.receivers = {
                name: stack.enter_context(Receiver(behaviour))
                for name, behaviour in (("moody", self.mood), ("gone", 410), ("steady", 200))
            }
            self.parts = parts = stack.enter_context(Parts(*self._given))
            self._until_up()
            self._subscribe()
            load = Load(parts.url, self.seed, [self.receivers["moody"].url, self.receivers["gone"].url])
            chaos = Chaos(parts, self.seed, self._tell)
            self._began = time.monotonic()
            load.start()
            chaos.start()
            time.sleep(self.seconds)
            chaos.stop()
            load.stop()
            quiet = time.monotonic()
            self._come_to_rest(load)
            self.verdict.figures["seconds to rest"] = round(time.monotonic() - quiet, 1)
            self._judge(load, chaos)
        return self.verdict

    def _tell(self, text: str) -> None:
        self.say(f"  {time.monotonic() - self._began:5.1f} s {text}")

    def _until_up(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while len(self.parts.log_lines("engine_ready")) < 2 * WORKERS or not self._answers():
            assert time.monotonic() < deadline, "the fleet did not come up"
            time.sleep(0.2)

    def _answers(self) -> bool:
        try:
            return httpx2.get(f"{self.parts.url}/ready", trust_env=False).status_code == 200
        except httpx2.TransportError:
            return False

    def _subscribe(self) -> None:
        """One endpoint that hears of every end, and known secrets."""
        ledger = self.parts.ledger
        self.endpoint = "we_" + "1" * 32
        self.secrets = {self.endpoint: new_secret()}
        urls = new_secret()
        ledger.put_endpoint(self.endpoint, "default", "all", self.receivers["steady"].url, ENDPOINT_EVENTS,
                            self.secrets[self.endpoint])  # fmt: skip
        ledger.rotate_secret(None, "default", urls)
        self.secrets |= {self.receivers["moody"].url: urls, self.receivers["gone"].url: urls}

    def _come_to_rest(self, load: Load) -> None:
        """Until all has ended, or nothing ends any more. The outbox's time runs faster: its schedule takes days."""
        self.mood.calm = True
        ledger = self.parts.ledger
        deadline = time.monotonic() + REST_SECONDS
        while time.monotonic() < deadline:
            self.parts.revive()
            waiting = [job.id for job in load.accepted if not ledger.get(job.id).terminal]
            if not waiting and self._batches_ended(load):
                pass_time(ledger, DAY)
                gone = self.receivers["gone"].url
                if all(each.state != "pending" or each.url == gone for each in invariants.deliveries(ledger)):
                    break
            time.sleep(0.3)
        else:
            self.verdict.wrong.append(f"no rest within {REST_SECONDS} s")
        time.sleep(1)  # what is told of last is written down by then

    def _batches_ended(self, load: Load) -> bool:
        client, prefix = self.parts.ledger.redis, self.parts.ledger.prefix
        states = [(client.hget(f"{prefix}batch:{batch}", "status") or b"").decode() for batch in load.batches]
        return all(state in BATCH_ENDS for state in states)

    def _judge(self, load: Load, chaos: Chaos) -> None:
        ledger, verdict = self.parts.ledger, self.verdict
        gone = self.receivers["gone"].url
        receivers = {self.endpoint: self.receivers["steady"], self.receivers["moody"].url: self.receivers["moody"],
                     gone: self.receivers["gone"]}  # fmt: skip
        wrong = verdict.wrong
        wrong += load.complaints + chaos.complaints
        if "Truncating the AOF" in (self.parts.folder / "redis.log").read_text(errors="replace"):
            wrong.append("Redis found half a write in its file, which was to be taken out before its start")
        wrong += invariants.jobs_wrong(ledger, load.accepted, self.parts.store)
        wrong += invariants.strangers(ledger, load.accepted)
        wrong += self._batches_wrong(load)
        wrong += invariants.told_wrong(ledger, load.accepted, receivers, self.secrets, gone={gone})
        wrong += invariants.unrest(ledger)
        wrong += invariants.ownerless(ledger)
        verdict.faults = chaos.done
        records = [ledger.get(job.id) for job in load.accepted]
        verdict.figures |= {
            "accepted": len(load.accepted),
            "ended": dict(Counter(record.state for record in records)),
            "attempts": sum(record.attempts for record in records),
            "deaths": sum(record.deaths for record in records),
            "batches": len(load.batches),
            "deliveries": dict(Counter(each.state for each in invariants.deliveries(ledger))),
            "asked again": load.repeats,
            "replies lost": sum(wire.lost for wire in [*self.parts.wires.values(), self.parts.bucket]),
        }
        self._forget_all(load)

    def _batches_wrong(self, load: Load) -> list[str]:
        if not load.batches or not self._answers():
            return ["the API does not answer at the end"] if load.batches else []
        wrong = []
        with closing(openai.OpenAI(base_url=f"{self.parts.url}/v1", api_key="none", max_retries=3)) as client:
            for batch_id, lines in load.batches.items():
                batch = client.batches.retrieve(batch_id)
                if batch.status != "completed":
                    wrong.append(f"{batch_id} is {batch.status} with {batch.request_counts}")
                    continue
                entries = [read_lines(client, name) for name in (batch.output_file_id, batch.error_file_id)]
                wrong += invariants.batch_wrong(batch, lines, entries)
        return wrong

    def _forget_all(self, load: Load) -> None:
        """When the time of everything is over, nothing is left that belongs to a job or a batch."""
        ledger, wrong = self.parts.ledger, self.verdict.wrong
        client, prefix = ledger.redis, ledger.prefix
        for key in ("batches:ended", "expiring", "forget_deliveries"):
            for member, _ in client.zrange(prefix + key, 0, -1, withscores=True):
                client.zadd(prefix + key, {member: 1}, xx=True)
        deadline = time.monotonic() + 30
        patterns = (
            "job:*",
            "batch:*",
            "file:*",
            "delivery:*",
            "parts:*",
            "owners:*",
            "events:*",
            "tries:*",
            "output:*",
        )
        while time.monotonic() < deadline:
            ledger.sweep(100, result_ttl_ms=0, dead_ttl_ms=0)
            left = [key.decode() for pattern in patterns for key in client.keys(prefix + pattern)]
            if not left:
                break
            time.sleep(0.1)
        else:
            wrong += [f"{key} is left when all has been forgotten" for key in left[:20]]
        wrong += invariants.ownerless(ledger)
