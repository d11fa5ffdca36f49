"""What is true of a fleet at rest, whatever died before: each check answers with what it finds wrong, in sentences.

It reads the ledger, its Redis, the store and what receivers heard, and compares them with what was accepted. A scripted
engine makes the answers (fake_engine.py), so what each job must say is known without asking anybody.
"""

import json
import re
from collections import Counter
from dataclasses import dataclass, field

import standardwebhooks
from fake_engine import answer
from fake_pictures import picture
from fleet import deltas

from inferfleet.tasks import names
from inferfleet.tasks.errors import FleetError, JobNotFound
from inferfleet.workers.flight import seed_of

PAGE = 100


@dataclass
class Accepted:
    """A job that somebody was told of with a 202."""

    id: str
    #: How it may end.
    ends: frozenset[str] = frozenset({"completed"})
    #: Tokens of its answer; None = it paints a picture.
    tokens: int | None = None
    webhook: str | None = None
    #: What else it was accepted as, by repeated calls with one key: more than one id is a job done twice.
    ids: set[str] = field(default_factory=set)


def jobs_wrong(ledger, accepted, store):
    """Accepted = terminal, each once, with the result that it must have."""
    wrong = [f"one key made the jobs {sorted(job.ids)}" for job in accepted if job.ids - {job.id}]
    for job in accepted:
        try:
            record = ledger.get(job.id)
        except JobNotFound:
            wrong.append(f"{job.id} was accepted and is not there")
            continue
        wrong += [f"{job.id} {text}" for text in _job_wrong(ledger, job, record, store)]
    return wrong


def _job_wrong(ledger, job, record, store):
    if not record.terminal:
        return [f"has not ended: it is {record.state} after {record.attempts} attempts"]
    wrong = []
    events = ledger.events(job.id)
    numbers = [event["sequence_number"] for event in events]
    ends = [event["type"] for event in events if names.is_terminal_event(event["type"])]
    if numbers != list(range(len(events))):
        wrong.append("has a log with gaps")
    if ends != [f"job.{record.state}"] or events[-1]["type"] != ends[0]:
        wrong.append(f"is {record.state}, and its log tells the ends {ends}")
    if record.state not in job.ends:
        wrong.append(f"ended as {record.state} ({(record.error or {}).get('code')}) instead of {sorted(job.ends)}")
    if record.state == "completed":
        wrong += _text_wrong(record, events, job.tokens) if job.tokens is not None else _picture_wrong(record, store)
    return wrong


def _text_wrong(record, events, tokens):
    expected = answer(seed_of(record.id), tokens)
    wrong = []
    if "".join(event["delta"] for event in deltas(events)) != expected:
        wrong.append("told another text than its own, or a part of it twice")
    if json.loads(record.response)["choices"][0]["message"]["content"] != expected:
        wrong.append("has another text than its own as its answer")
    return wrong


def _picture_wrong(record, store):
    (output,) = record.outputs
    try:
        data = store.get(output["id"], output["hash"].removeprefix("sha256:"))
    except FleetError as error:
        return [f"has a picture that cannot be read: {error.code}"]
    if data != picture(output["seed"]):
        return ["has another picture than its own"]
    return [] if output["seed"] == seed_of(record.id) else ["was painted with another seed"]


def strangers(ledger, accepted, tenant="default"):
    """Jobs that nobody was told of: an accepted job that was made twice, or a line of a batch that was left behind."""
    known = {job.id for job in accepted}
    seen = {name.decode() for name in ledger.redis.zrange(f"{ledger.prefix}jobs:{tenant}", 0, -1)}
    return [f"{job_id} is there and was accepted by no answer" for job_id in sorted(seen - known)]


# Batches -------------------------------------------------------------------------------------------------------------


def batch_wrong(batch, lines, entries):
    """Every line of an ended batch stands in exactly one file. `lines`: custom_id -> (seed, tokens), or None for one
    that must fail; `entries`: what stands in the output file and in the error file."""
    output, errors = entries
    wrong = []
    seen = Counter(entry["custom_id"] for entry in output + errors)
    once = Counter(list(lines))
    if seen != once:
        wrong.append(f"has the lines {sorted((seen - once) + (once - seen))} wrongly often")
    counts = batch.request_counts
    if (counts.total, counts.completed, counts.failed) != (len(lines), len(output), len(errors)):
        wrong.append(f"counts {counts} with {len(output)} and {len(errors)} lines in its files")
    for entry in output:
        expected = lines.get(entry["custom_id"])
        said = entry["response"]["body"]["choices"][0]["message"]["content"]
        if expected is None or said != answer(*expected):
            wrong.append(f"has a wrong answer to {entry['custom_id']}")
    lost = [entry["custom_id"] for entry in errors if lines.get(entry["custom_id"]) is not None]
    return [f"{batch.id} {text}" for text in [*wrong, *(f"failed at {name}" for name in lost)]]


# Webhooks ------------------------------------------------------------------------------------------------------------


def deliveries(ledger, tenant="default"):
    """All of a tenant's."""
    found, after = [], None
    while True:
        page, more = ledger.list_deliveries(tenant, limit=PAGE, after=after)
        found += page
        if not more:
            return found
        after = page[-1].id


def told_wrong(ledger, accepted, receivers, secrets, *, gone=(), tenant="default"):
    """Outbox = ends: each end is told once for each receiver that wants it, and what was delivered did arrive.

    receivers: where deliveries go (a URL, or the id of an endpoint) -> its Receiver; secrets: the same -> its secret;
    gone: places whose receiver answers 410.
    """
    wrong, expected = [], Counter()
    endpoints = [place for place in receivers if place.startswith("we_")]
    for job in accepted:
        record = ledger.get(job.id)
        for place in [*endpoints, *([job.webhook] if job.webhook else [])]:
            expected[job.id, f"job.{record.state}", place] += 1
    found = deliveries(ledger, tenant)
    seen = Counter((each.subject, each.type, each.endpoint or each.url) for each in found)
    wrong += [f"{what} is not in the outbox" for what in expected - seen]
    wrong += [f"{what} is in the outbox without a reason" for what in seen - expected]
    heard = {place: _heard(receiver, secrets[place], wrong) for place, receiver in receivers.items()}
    for each in found:
        place = each.endpoint or each.url
        # What comes after the first 410 waits for somebody to replay it, until it is forgotten.
        if each.state not in ({"failed", "pending"} if place in gone else {"delivered"}):
            wrong.append(f"the delivery of {each.type} of {each.subject} is {each.state} ({each.last_error})")
        if each.state == "delivered" and heard[place].get(each.event) != (each.type, each.subject):
            wrong.append(f"{each.event} of {each.subject} was delivered, and its receiver heard nothing of it")
    return wrong


def _heard(receiver, secret, wrong):
    """What a receiver heard, by event: one event is always told with the same words, signed."""
    heard, bodies = {}, {}
    for request in list(receiver.requests):
        event = request.headers["webhook-id"]
        try:
            standardwebhooks.Webhook(secret).verify(request.body, request.headers)
        except standardwebhooks.WebhookVerificationError as error:
            wrong.append(f"{event} arrived with a bad signature: {error}")
        if bodies.setdefault(event, request.body) != request.body:
            wrong.append(f"{event} was told with different words")
        body = json.loads(request.body)
        heard[event] = (body["type"], body["data"]["id"])
    return heard


# Redis ---------------------------------------------------------------------------------------------------------------

#: Empty where nothing waits or runs.
RESTLESS = ("waiting:*", "ages:*", "classes:*", "turns:*", "costs:*", "bytes", "running:*", "leases", "deadlines",
            "queue:*", "sending:*", "outbox", "runs", "run_due", "run_leases", "batches:open", "tail:*", "batch_done:*",
            "batch_only:*", "users:*")  # fmt: skip


def unrest(ledger):
    """What still waits, runs or is leased though all has ended. The queue of a receiver that is gone may wait."""
    found = [key.decode() for pattern in RESTLESS for key in ledger.redis.keys(ledger.prefix + pattern)]
    queue, health = f"{ledger.prefix}queue:", f"{ledger.prefix}receiver:"
    gone = {key for key in found if key.startswith(queue)
            and ledger.redis.hget(key.replace(queue, health), "disabled") == b"gone"}  # fmt: skip
    return [f"{key} is not empty" for key in found if key not in gone]


#: Keys that belong to a thing of another key, by the pattern of their name: where the thing is.
OWNED = (
    (r"(?:events|tries):(job_\w+)", "job:{}"),
    (r"(?:batch_failed|batch_done|batch_only|tail):(batch_\w+)", "batch:{}"),
    (r"(?:parts):(\w[\w-]*)", "owners:{}"),
    (r"users:(file-\w+)", "file:{}"),
    (r"receiver:(we_\w+)", "endpoint:{}"),
)
#: Things that stand in a list of their tenant.
LISTED = (
    (r"job:(\w+)", "jobs"),
    (r"batch:(\w+)", "batches"),
    (r"delivery:(\w+)", "deliveries"),
    (r"endpoint:(\w+)", "endpoints"),
)
#: The lists, and what the namespace has one of.
FLEETWIDE = re.compile(
    r"(seq|delivery_number|signing|reaper|server|tenants|runs|run_due|run_leases|models|ended|finished|dead|leases"
    r"|deadlines|expiring|forget_deliveries|outbox|bytes|batches:(open|ended)"
    r"|(waiting|ages|running|pace|dead|jobs|in|batches|deliveries|endpoints|files|here|cards"
    r"|order|classes|turns|rested|costs|quota|hook_secret|queue|sending|keys|workers|figures|metrics):?.*)"
)


def ownerless(ledger):
    """Keys that live for ever and belong to nothing that is still there."""
    client, prefix = ledger.redis, ledger.prefix
    kept = _kept_files(ledger)
    wrong = []
    for key in map(bytes.decode, client.scan_iter(ledger.prefix + "*", count=1000)):
        if client.ttl(key) >= 0 or client.ttl(key) == -2:
            continue
        name = key.removeprefix(prefix)
        if not _has_owner(client, prefix, name, key, kept):
            wrong.append(f"{name} belongs to nobody and lives for ever")
    return wrong


def _has_owner(client, prefix, name, key, kept):
    for pattern, owner in OWNED:
        if found := re.fullmatch(pattern, name):
            return client.exists(prefix + owner.format(found[1])) == 1
    for pattern, lists in LISTED:
        if found := re.fullmatch(pattern, name):
            tenant = client.hget(key, "tenant").decode()
            return client.zscore(f"{prefix}{lists}:{tenant}", found[1]) is not None
    kind, _, rest = name.partition(":")
    if kind == "file":
        return client.zscore(prefix + "expiring", rest) is not None
    if kind == "idem":
        # A job's, a file's or a batch's; the last two may be named by their key alone.
        owner = client.get(key).decode()
        return any(client.exists(f"{prefix}{thing}:{owner}") for thing in ("job", "file", "batch"))
    if kind == "owners":
        things = ("file", "batch")
        return any(
            client.exists(f"{prefix}{thing}:{each.decode()}") for each in client.smembers(key) for thing in things
        )
    if kind == "output":
        return rest in kept
    return FLEETWIDE.fullmatch(name) is not None


def _kept_files(ledger):
    """Keys of files in this Redis that a job's record or a shelf names."""
    client = ledger.redis
    kept = set()
    for key in client.scan_iter(ledger.prefix + "job:*", count=1000):
        kept |= set((client.hget(key, "output_keys") or b"").decode().split())
    for key in client.scan_iter(ledger.prefix + "parts:*", count=1000):
        kept |= {json.loads(part)["key"] for part in client.hvals(key)}
    return kept
