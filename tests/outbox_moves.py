"""The moves that webhook tests are made of: a tenant's deliveries, taken and recorded; and the time that passes."""

import itertools
import json

from inferfleet.tasks.webhooks import Verdict, new_secret

URL = "https://receiver.example/hook"
LEASE, KEEP = 60_000, 60_000
numbers = itertools.count()


def put_endpoint(ledger, tenant="a", events=("job.completed",), url=URL, endpoint_id=None):
    endpoint_id = endpoint_id or f"we_{next(numbers):032x}"
    ledger.put_endpoint(endpoint_id, tenant, "name", url, events, new_secret())
    return endpoint_id


def take(ledger, token=None, lease_ms=LEASE):
    return ledger.take_delivery(token or f"take{next(numbers)}", lease_ms)


def record(ledger, taken, outcome="delivered", **about):
    return ledger.record_delivery(taken, Verdict(outcome, **about), KEEP)


def fail(ledger, times=1):
    """So many attempts that come to nothing, each made when it was due."""
    for _ in range(times):
        pass_time(ledger, 6)
        record(ledger, take(ledger), "again", status=500, error="bad_status", delay_ms=5000)


def deliveries(ledger, tenant="a", **filters):
    return ledger.list_deliveries(tenant, limit=100, **filters)[0]


def told(ledger, tenant="a"):
    """The event types put into the outbox, oldest first."""
    return [delivery.type for delivery in reversed(deliveries(ledger, tenant))]


def body(taken):
    return json.loads(taken.body)


def pass_time(ledger, seconds=10 * 86400, also=()):
    """Let so much time pass for the outbox: what was to come after so long has come. Leases end too."""
    prefix, redis = ledger.prefix, ledger.redis
    for key in [prefix + "outbox", *redis.keys(prefix + "queue:*"), *redis.keys(prefix + "sending:*"), *also]:
        for member, score in redis.zrange(key, 0, -1, withscores=True):
            # xx: what a live worker took away meanwhile stays away.
            redis.zadd(key, {member: round(score - 1000 * seconds)}, xx=True)
    for key in redis.keys(prefix + "receiver:*"):
        for field in ("open_until_ms", "failing_since_ms"):
            if value := redis.hget(key, field):
                redis.hset(key, field, round(int(value) - 1000 * seconds))
    for key in (*redis.keys(prefix + "endpoint:*"), *redis.keys(prefix + "hook_secret:*")):
        if value := redis.hget(key, "old_until_ms"):
            redis.hset(key, "old_until_ms", round(int(value) - 1000 * seconds))
